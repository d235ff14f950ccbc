"""Real processes: three services and their workers on free ports, and a two-layer model made on the spot.

A worker takes seconds to start, and so does a registration, so the tests share one cluster: `whole`, or `tuning` while
it has no worker for evaluation. A module uses one of these, and is named in TOGETHER in tests/conftest.py, those of
`tuning` first. Names are a test's own, or its project is; what a test ends starts again before the next.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e.leftovers import left_over
from tests.stores import environment

from luthier.client import Client, ConfigArguments, RetryPolicy
from luthier.v1 import data_service_pb2, evaluation_service_pb2, model_service_pb2, training_service_pb2
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN, DatasetSource
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, LoraConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.worker.v1 import hold_service_pb2, worker_service_pb2

SERVICES = ("data", "training", "evaluation")
TUNING_WORKERS = ("data-worker", "training-worker")
# In the last one, the model of the name `tiny` is another.
PROJECTS = ("default", "other", "plain")
WAIT = 240.0
# By default gRPC tries again after a second, and then after longer ones.
AT_ONCE = [("grpc.max_reconnect_backoff_ms", 100)]
JUDGE_KEY = "sk-that-nobody-but-the-judge-may-see"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Cluster:
    """Services and workers as child processes; each can be killed and started again."""

    serving_seconds = WAIT

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        ports = free_ports(6)
        self.addresses = {name: f"127.0.0.1:{port}" for name, port in zip(SERVICES, ports, strict=False)}
        self.metrics = {name: f"127.0.0.1:{port}" for name, port in zip(SERVICES, ports[3:], strict=True)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
        settings = {
            "LUTHIER_HOME": str(self.home),
            "LUTHIER_PROJECTS": ",".join(PROJECTS),
            "LUTHIER_WEBHOOKS_ADDRESSES": "127.0.0.1",
            "LUTHIER_WORKER_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "LUTHIER_JUDGE_KEYS": "JUDGE_KEY@127.0.0.1",
            "JUDGE_KEY": JUDGE_KEY,
        }
        for name in SERVICES:
            settings[f"LUTHIER_{name.upper()}_ADDRESS"] = self.addresses[name]
            settings[f"LUTHIER_{name.upper()}_METRICS_ADDRESS"] = self.metrics[name]
        return clean | settings | environment(self.home)

    def start(self, *names: str) -> None:
        """Start services (`data`) and workers (`data-worker`); return when the services serve."""
        for name in names:
            module = f"luthier.{name.replace('-', '.')}"
            with (self.home / f"{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [sys.executable, "-m", module],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        for name in names:
            if name in SERVICES:
                self._await_serving(name)

    def running(self, *names: str) -> None:
        """Have just these run: start those that a test has ended, end others; none may have ended by itself."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                pytest.fail(f"{name} ended with {process.returncode}:\n{self.log(name)}")
        for name in self._processes.keys() - set(names):
            self.end(name, within_seconds=30)
        self.start(*(name for name in names if name not in self._processes))

    def restart_ended(self, name: str) -> bool:
        """Start a worker again that has ended by itself, as whoever supervises it would; returns whether it had."""
        if (process := self._processes.get(name)) is None or process.poll() is None:
            return False
        del self._processes[name]
        self.start(name)
        return True

    def faults(self) -> list[str]:
        """What `luthierd fsck` says is wrong with the home, of all that its services keep."""
        command = [sys.executable, "-m", "luthier.daemon", "fsck", "--json"]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=False, timeout=WAIT
        )
        assert done.returncode in (0, 1), done.stderr
        faults = [line for line in done.stdout.splitlines() if json.loads(line)["what"] == "fault"]
        assert done.returncode == bool(faults), "its status says whether there are faults"
        return faults

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def kill(self, name: str) -> None:
        """kill -9, and wait until the process is gone."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def end(self, name: str, *, within_seconds: float) -> None:
        """SIGTERM, and wait until the process is gone; it must go in time."""
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"{name} did not stop within {within_seconds} s of SIGTERM:\n{self.log(name)}")

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for name, process in self._processes.items():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                pytest.fail(f"{name} did not stop on SIGTERM:\n{self.log(name)}")

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")[-4000:]

    def client(self, project: str = "default", retry: RetryPolicy | None = None) -> Client:
        return Client(
            ConfigArguments(
                home=self.home,
                project=project,
                retry=retry,
                data_address=self.addresses["data"],
                training_address=self.addresses["training"],
                evaluation_address=self.addresses["evaluation"],
            )
        )

    def _await_serving(self, name: str) -> None:
        deadline = time.monotonic() + self.serving_seconds
        with grpc.insecure_channel(self.addresses[name], AT_ONCE) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline:
                if self._processes[name].poll() is not None:
                    pytest.fail(f"{name} ended at start-up:\n{self.log(name)}")
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                except grpc.RpcError:
                    time.sleep(0.05)
                    continue
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        pytest.fail(f"{name} does not serve:\n{self.log(name)}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def make_tiny_model(folder: Path, **shape: int) -> None:
    """A random two-layer Llama with a byte-level tokenizer, in transformers' layout; `shape`: what of it is else."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["colour of the sky is blue and the grass is green"] * 8, trainer)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        **(sizes | shape),
        vocab_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_examples(path: Path, count: int, start: int = 0) -> Path:
    """Chats that a tiny model can learn by heart: the colour of numbered things."""
    colours = ("red", "green", "blue")
    with path.open("w") as file:
        for number in range(start, start + count):
            messages = [
                {"role": "user", "content": f"colour of thing {number}?"},
                {"role": "assistant", "content": json.dumps({"colour": colours[number % 3]})},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@dataclass
class Shared:
    """The cluster, and the rendering of its model `tiny` in the default project."""

    cluster: Cluster
    rendering: str


SHARED = pytest.StashKey[Shared]()


def shared(session: pytest.Session, folders: pytest.TempPathFactory, *workers: str) -> Shared:
    """The session's cluster, prepared, with all services and just these workers running."""
    found = session.stash.get(SHARED, None)
    if found is None:
        found = session.stash[SHARED] = Shared(Cluster(folders.mktemp("cluster") / "home"), "")
        found.cluster.start(*SERVICES, *workers)
        with found.cluster.client() as client:
            found.rendering = prepare(found.cluster, client)
    assert found.rendering, "the cluster was not prepared: see the first test that wanted it"
    found.cluster.running(*SERVICES, *workers)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Stop what no later test needs, as its workers hold a gigabyte; whatever was killed, no bytes are left over."""
    yield
    found = item.session.stash.get(SHARED, None)
    if found is not None and (nextitem is None or nextitem.path.parent != item.path.parent):
        del item.session.stash[SHARED]
        found.cluster.stop()
        assert asyncio.run(left_over(found.cluster.home)) == []


@pytest.fixture
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Three services and all workers."""
    return shared(request.session, tmp_path_factory, *TUNING_WORKERS, "evaluation-worker")


@pytest.fixture(scope="module")
def checked_in_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever its tests killed: every reference has its blob, every blob its reference, and digests hold."""
    yield
    found = request.session.stash.get(SHARED, None)
    assert found is not None, "what is to be checked is the cluster that the module's tests share"
    assert found.cluster.faults() == []


@pytest.fixture
def cluster(whole: Shared) -> Cluster:
    return whole.cluster


@pytest.fixture
def tuning(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Three services, no evaluation worker."""
    return shared(request.session, tmp_path_factory, *TUNING_WORKERS)


def described_methods(service: str) -> list[MethodDescriptor]:
    """All methods that a service's process offers, those for workers and for other services included."""
    files = {
        "data": (data_service_pb2,),
        "training": (training_service_pb2, model_service_pb2),
        "evaluation": (evaluation_service_pb2,),
    }[service]
    return [
        method
        for file in (*files, worker_service_pb2, hold_service_pb2)
        for described in file.DESCRIPTOR.services_by_name.values()
        for method in described.methods
    ]


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def all_methods(service: str) -> list[str]:
    """Full names of all methods of a service's process."""
    return [path_of(method) for method in described_methods(service)]


def public_methods(service: str) -> list[str]:
    """Full names of its unary methods."""
    return [
        path_of(method)
        for method in described_methods(service)
        if not method.client_streaming and not method.server_streaming
    ]


def prepare(cluster: Cluster, client: Client, records: int = 48) -> str:
    """Register the tiny model as `tiny`, build and render a version; returns the rendering's name."""
    folder = cluster.home / "models" / "tiny"
    make_tiny_model(folder)
    client.models.register_base(Model(directory=str(folder)), model_id="tiny")
    client.models.wait("tiny", timeout_seconds=WAIT)
    client.datasets.create("things")
    sources = []
    for name, count, start, split in (("train", records, 0, SPLIT_TRAIN), ("test", 12, 5, SPLIT_TEST)):
        path = write_examples(cluster.home / f"{name}.jsonl", count, start=start)
        upload = client.datasets.upload(path)
        sources.append(DatasetSource(upload=upload.name, split=split))
    # The test rows stand in the train file too, so they go first: of equal records the first is kept.
    version = client.datasets.create_version("things", list(reversed(sources)))
    client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
    rendering = client.renderings.create(Rendering(dataset_version=version.name, model="tiny"))
    return client.renderings.wait(rendering.name, timeout_seconds=WAIT).name


def job(rendering: str, steps: int, **settings: object) -> FineTuningJob:
    hyperparameters = Hyperparameters(max_steps=steps, num_epochs=1000, batch_rows=8, learning_rate=5e-3)
    return FineTuningJob(
        base_model="tiny",
        rendering=rendering,
        lora=LoraConfig(rank=8),
        hyperparameters=hyperparameters,
        **settings,  # type: ignore[arg-type]
    )
