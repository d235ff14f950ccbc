"""Both clients: the same methods, every RPC, light imports."""

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import luthier.client
from luthier.client import AsyncClient, Client, ClientConfig, ConfigArguments
from luthier.client.async_driver import AsyncResource, AsyncStream
from luthier.client.channels import connect
from luthier.client.sync_driver import Stream, SyncResource
from luthier.errors import Cancelled, InvalidArgument
from luthier.v1.dataset_pb2 import Dataset
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.grader_pb2 import Grader, Sample
from luthier.v1.model_alias_pb2 import ModelAlias
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

# What a method is called with where its first argument is not a name.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "datasets.upload": (__file__,),
    "datasets.create_version": ("d", []),
    "datasets.list": (),
    "datasets.list_uploads": (),
    "datasets.versions.list": ("d",),
    "renderings.create": (Rendering(dataset_version="d/v", model="m"),),
    "renderings.list": (),
    "models.register_base": (Model(gguf_path="/m.gguf"),),
    "models.export": ("m", "gguf-f16"),
    "models.list": (),
    "models.download": ("m", "/nonexistent/folder"),
    "jobs.plan": (FineTuningJob(base_model="m", rendering="r"),),
    "jobs.create": (FineTuningJob(base_model="m", rendering="r"),),
    "jobs.start": (FineTuningJob(base_model="m", rendering="r"),),
    "jobs.list": (),
    "jobs.get_checkpoint": ("j/c",),
    "evaluations.create": (Evaluation(dataset_version="d/v", arms=[EvaluationArm(model="m")]),),
    "evaluations.list": (),
    "evaluations.grade": (Grader(name="g"), [Sample(output_text="a")]),
    "aliases.create": (ModelAlias(),),
    "aliases.list": (),
    "aliases.move": ("a", "m"),
    "generate": ("m", "hello"),
    "learning_curve": (FineTuningJob(base_model="m", rendering="r"), Evaluation()),
}
KEYWORDS = {"learning_curve": {"curve_id": "c"}}


def _methods(resource: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in dir(type(resource)):
        if not name.startswith("_") and name != "close":
            yield prefix + name, getattr(resource, name)
    for name, value in vars(resource).items():
        if isinstance(value, SyncResource | AsyncResource):
            yield from _methods(value, f"{prefix}{name}.")


def _arguments(name: str) -> tuple[Any, ...]:
    default = ("d/v",) if ".versions." in name else ("x",)
    return ARGUMENTS.get(name, default)


def test_both_clients_have_the_same_methods_with_the_same_signatures(
    client: Client, config: ClientConfig
) -> None:
    sync = {name: inspect.signature(method) for name, method in _methods(client)}
    asynchronous = {name: inspect.signature(method) for name, method in _methods(AsyncClient(config))}
    # What returns a job in the hand returns each client's own.
    assert {name: str(one) for name, one in sync.items()} == {
        name: str(one).replace("AsyncJobHandle", "JobHandle") for name, one in asynchronous.items()
    }
    assert len(sync) > 40
    for name, method in _methods(client):
        assert method.__doc__, name
        assert "scope" not in sync[name].parameters


async def test_both_clients_make_the_same_calls_and_know_every_rpc(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    def calls_of() -> set[str]:
        made = set(services.calls)
        services.calls.clear()
        return made

    seen: set[str] = set()
    async_methods = dict(_methods(async_client))
    known = dict(services.answers)
    for name, method in _methods(client):
        # Whose events or rows are asked for is known before: what begins with a `get` meets a service without it.
        services.answers = {} if name.endswith((".get", ".handle", "learning_curve")) else known
        with pytest.raises(NotImplementedError):
            _call(method, name)
        of_sync = calls_of()
        with pytest.raises(NotImplementedError):
            await _call_async(async_methods[name], name)
        assert of_sync, name
        assert calls_of() == of_sync, name
        seen |= of_sync
    behind_others = {"WriteUpload", "DownloadModelFile"}
    assert seen | behind_others == _all_rpcs()


def _call(method: Any, name: str) -> None:
    result = method(*_arguments(name), **KEYWORDS.get(name, {}))
    assert isinstance(result, Stream), name
    next(result)


async def _call_async(method: Any, name: str) -> None:
    result = method(*_arguments(name), **KEYWORDS.get(name, {}))
    await (anext(result) if isinstance(result, AsyncStream) else result)


def _all_rpcs() -> set[str]:
    from luthier.v1 import data_service_pb2, evaluation_service_pb2, model_service_pb2, training_service_pb2

    files = (data_service_pb2, evaluation_service_pb2, model_service_pb2, training_service_pb2)
    return {
        rpc.name
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for rpc in service.methods
    }


def test_methods_resolve_short_names_in_messages(services: Any, client: Client) -> None:
    seen: list[Any] = []

    def create(request: Any, context: Any) -> FineTuningJob:
        seen.append(request)
        return FineTuningJob()

    services.answers["CreateFineTuningJob"] = create
    given = FineTuningJob(base_model="m", rendering="projects/other/renderings/r")
    client.jobs.create(given, job_id="j")
    assert seen[0].fine_tuning_job.base_model == "projects/default/models/m"
    assert seen[0].fine_tuning_job.rendering == "projects/other/renderings/r"
    assert seen[0].fine_tuning_job_id == "j"
    assert given.base_model == "m"


def test_closing_the_client_ends_running_calls(services: Any, config: ClientConfig) -> None:
    def generate(request: Any, context: Any) -> Iterator[Any]:
        from luthier.v1.evaluation_service_pb2 import GenerateTextResponse

        yield GenerateTextResponse(text="a")
        time.sleep(0.5)
        yield GenerateTextResponse(text="b")

    services.answers["GenerateText"] = generate
    client = Client(config)
    pieces = client.generate("m", "hello")
    assert next(pieces).text == "a"
    client.close()
    with pytest.raises(Cancelled):
        next(pieces)


def _endless(services: Any) -> threading.Event:
    """Let GenerateText say one word and then wait; what is returned is set when its call has ended."""
    from luthier.v1.evaluation_service_pb2 import GenerateTextResponse

    ended = threading.Event()

    def generate(request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(ended.set)
        yield GenerateTextResponse(text="a")
        ended.wait(20)

    services.answers["GenerateText"] = generate
    return ended


def test_a_stream_can_be_closed_while_another_thread_waits_for_it(services: Any, client: Client) -> None:
    ended = _endless(services)
    pieces = client.generate("m", "hello")
    assert next(pieces).text == "a"
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, pieces)
        time.sleep(0.2)
        pieces.close()
        with pytest.raises(Cancelled):
            waiting.result(10)
    assert ended.wait(10)
    assert list(pieces) == []


async def test_a_stream_can_be_closed_while_another_task_waits_for_it(
    services: Any, async_client: AsyncClient
) -> None:
    ended = _endless(services)
    pieces = async_client.generate("m", "hello")
    assert (await anext(pieces)).text == "a"
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0.2)
    await pieces.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(ended.wait, 10)
    assert [piece async for piece in pieces] == []


async def test_a_task_that_is_cancelled_ends_its_call(services: Any, async_client: AsyncClient) -> None:
    ended = _endless(services)
    pieces = async_client.generate("m", "hello")
    assert (await anext(pieces)).text == "a"
    waiting = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0.2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(ended.wait, 10)


async def test_the_sync_client_works_where_an_event_loop_runs(services: Any, client: Client) -> None:
    ended = _endless(services)
    with client.generate("m", "hello") as pieces:
        assert next(pieces).text == "a"
    assert ended.wait(10)
    services.answers["GetDataset"] = lambda request, context: Dataset(name=request.name)
    assert client.datasets.get("a").name == "projects/default/datasets/a"


def test_a_stream_that_is_dropped_ends_its_call(services: Any, client: Client) -> None:
    ended = _endless(services)
    assert next(client.generate("m", "hello")).text == "a"
    gc.collect()
    assert ended.wait(10)


def test_client_reads_what_it_is_not_told(services: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    monkeypatch.setenv("LUTHIER_DATA_ADDRESS", services.address)
    services.answers["GetDataset"] = lambda request, context: Dataset(name=request.name)
    with Client() as client:
        assert client.datasets.get("a").name == "projects/default/datasets/a"
    with Client(ConfigArguments(project="other")) as client:
        assert client.datasets.get("a").name == "projects/other/datasets/a"
    assert services.metadata["GetDataset"]["authorization"] == "Bearer test-key"


def test_client_refuses_to_send_the_key_in_the_clear(config: ClientConfig) -> None:
    far = ClientConfig(api_key="k", data_address="example.org:7601")
    with Client(far) as client, pytest.raises(InvalidArgument, match=r"example\.org:7601"):
        client.datasets.get("a")
    with Client(ClientConfig(api_key="k", data_address="https://127.0.0.1:1")) as client:
        assert client.datasets


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1@evil.example:80",
        "127.evil.example:80",
        "localhost:1@evil.example",
        "localhost.evil.example:80",
        "localhost:80/path",
        "localhost:80?query",
        "127.0.0.256:80",
        "127.1:80",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:70000",
        "[::1]evil.example:80",
        "[::2]:80",
        "http://127.0.0.1:80",
        "https://good.example@evil.example",
        "https://good.example/@evil.example",
        "https://good.example?x",
        "https://",
    ],
)
def test_client_does_not_send_the_key_where_an_address_misleads(address: str) -> None:
    with pytest.raises(InvalidArgument, match="must be host:port on loopback"):
        connect(ClientConfig(api_key="k", data_address=address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:1",
        "127.255.0.9:65535",
        "localhost:80",
        "LOCALHOST:1",
        "[::1]:7601",
        "unix:/run/x",
        "https://example.org",
        "https://[2001:db8::1]:443",
        "https://a-b.c/",
    ],
)
def test_client_sends_the_key_to_this_machine_and_over_tls(address: str) -> None:
    for channel in connect(ClientConfig(api_key="k", data_address=address)).channels:
        channel.close()


def _seconds(code: str) -> float:
    """Processor seconds that a fresh interpreter takes; neighbours on the same core may double them."""
    timed = f"import time; t = time.process_time(); {code}; print(time.process_time() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    return min(float(run.stdout) for run in runs)


def test_importing_the_client_is_quick() -> None:
    assert _seconds("import luthier.client") < 0.1
    # Two and a half times what it cannot do without, whatever the machine.
    needed = _seconds("import grpc.aio, google.protobuf.json_format")
    assert _seconds("from luthier.client import AsyncClient, Client") < 2.5 * needed


def test_importing_the_client_loads_no_server_and_no_torch() -> None:
    code = (
        "import sys; from luthier.client import Client, AsyncClient; import luthier.client.cli.jobs,"
        " luthier.client.report; print(chr(10).join(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = out.stdout.splitlines()
    own = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("luthier.")}
    assert own == {"luthier.client", "luthier.errors", "luthier.v1"}
    assert not {"torch", "numpy", "pyarrow", "sqlalchemy", "grpc_status", "transformers"} & set(loaded)


def test_every_public_name_can_be_imported() -> None:
    for name in luthier.client.__all__:
        assert getattr(luthier.client, name).__name__ == name
    with pytest.raises(AttributeError):
        luthier.client.Nothing  # noqa: B018
