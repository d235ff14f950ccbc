"""Whatever a caller sends, it is told what was wrong with it: never INTERNAL, never UNKNOWN, never silence."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.e2e.conftest import SERVICES, described_methods, free_ports, path_of
from tests.e2e.fuzzing import Fuzzer

from luthier.data import __main__ as data
from luthier.data.config import Config as DataConfig
from luthier.evaluation import __main__ as evaluation
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.auth import TaskTokens
from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.training import __main__ as training
from luthier.training.config import Config as TrainingConfig
from luthier.v1 import data_service_pb2, dataset_pb2, model_service_pb2
from luthier.work.host import hosting
from luthier.worker.v1 import task_pb2, worker_service_pb2

NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
# What gRPC itself answers, before any stage of ours: no method of this name, a message above 4 MiB.
BARE = {grpc.StatusCode.UNIMPLEMENTED}
CALL_SECONDS = 0.4
OTHERS = [
    method
    for file, service in (
        (health_pb2, "Health"),
        (reflection_pb2, "ServerReflection"),
    )
    for method in file.DESCRIPTOR.services_by_name[service].methods
]


@dataclass
class Site:
    """Two lines to one service."""

    channel: aio.Channel
    blocking: grpc.Channel


@dataclass
class Sites:
    """Three services in this process, and a line to each."""

    keys: Keys
    of: dict[str, Site]

    def credentials(self) -> list[tuple[tuple[str, str], ...]]:
        tokens = TaskTokens(self.keys.token_secret)
        ours = tokens.mint("default", ("projects/default/datasets/d",), 1, "t", 600)
        foreign = tokens.mint("other", ("projects/other",), 1, "t", 600)
        secrets = [*(self.keys.api_key,) * 6, *(self.keys.worker_key,) * 2, ours, foreign, "lk_wrong"]
        return [(("authorization", f"Bearer {secret}"),) for secret in secrets] + [()]

    async def call(self, service: str, path: str, data: bytes, secret: str) -> bytes:
        call: Any = self.of[service].channel.unary_unary(path)
        return bytes(await call(data, metadata=(("authorization", f"Bearer {secret}"),), timeout=20))


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[Sites]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    shared: dict[str, Any] = {
        "home": home,
        "log_level": "INFO",
        "projects": ("default", "other"),
        "data_address": addresses[0],
        "training_address": addresses[1],
        "metrics_address": "127.0.0.1:0",
    }
    rewarded = {**shared, "reward_addresses": ("127.0.0.1",)}
    data_config, training_config = DataConfig(**shared), TrainingConfig(**rewarded)
    evaluation_config = EvaluationConfig(**rewarded, evaluation_address=addresses[2])
    async with AsyncExitStack() as stack:
        for settings, build in (
            (data.settings_of(data_config), lambda parts: data.build(parts, data_config)),
            (training.settings_of(training_config), lambda parts: training.build(parts, training_config)),
            (
                evaluation.settings_of(evaluation_config),
                lambda parts: evaluation.build(parts, evaluation_config),
            ),
        ):
            await stack.enter_async_context(hosting(settings, build))
        of = {
            name: Site(
                await stack.enter_async_context(aio.insecure_channel(address)),
                stack.enter_context(grpc.insecure_channel(address)),
            )
            for name, address in zip(SERVICES, addresses, strict=True)
        }
        yield Sites(read_or_create_keys(home), of)


async def seeded(sites: Sites) -> list[str]:
    """Make something of each kind that a client alone can make, and lease its tasks; return their names."""
    api, worker = sites.keys.api_key, sites.keys.worker_key
    create = data_service_pb2.CreateDatasetRequest(parent="projects/default", dataset_id="d")
    await sites.call("data", "/luthier.v1.DataService/CreateDataset", create.SerializeToString(), api)
    start = data_service_pb2.StartUploadRequest(parent="projects/default")
    start.upload.filename = "a.jsonl"
    start.upload.size_bytes = 5
    answer = await sites.call("data", "/luthier.v1.DataService/StartUpload", start.SerializeToString(), api)
    upload = type(start.upload).FromString(answer).name
    register = model_service_pb2.RegisterBaseModelRequest(parent="projects/default", model_id="m")
    register.model.hub.repo_id = "a/b"
    path = "/luthier.v1.ModelService/RegisterBaseModel"
    await sites.call("training", path, register.SerializeToString(), api)
    names = ["projects/default", "projects/other", "projects/-", "projects/default/datasets/d", upload]
    names += [f"projects/default/datasets/d/versions/{one}" for one in ("v", "-", "a/b")]
    for family in ("models", "renderings", "fineTuningJobs", "evaluations"):
        names += [f"projects/default/{family}/m", f"projects/other/{family}/m", f"projects/default/{family}/"]
    names.append("projects/default/fineTuningJobs/m/checkpoints/1")
    for service in SERVICES:
        known = worker_service_pb2.RegisterWorkerRequest(
            worker="fuzz", instance="f" * 32, kinds=task_pb2.TaskKind.values()[1:]
        )
        path = "/luthier.worker.v1.WorkerService/"
        await sites.call(service, f"{path}RegisterWorker", known.SerializeToString(), worker)
        claim = worker_service_pb2.ClaimTaskRequest(worker="fuzz").SerializeToString()
        answer = await sites.call(service, f"{path}ClaimTask", claim, worker)
        names += [worker_service_pb2.ClaimTaskResponse.FromString(answer).task.task, "fuzz"]
    return [name for name in names if name]


def problem_of(error: Any) -> str | None:
    code, details = error.code(), error.details()
    if code in NEVER:
        return f"{code.name}: {details}"
    if code in BARE | {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}:
        return None
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    status = status_pb2.Status.FromString(packed)
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    return None if len(infos) == 1 else f"{code.name} with {len(infos)} ErrorInfo: {details}"


async def told(site: Site, method: MethodDescriptor, sent: list[bytes], metadata: Any) -> str | None:
    """Make a call, read at most five messages of what it streams; return what is wrong with the answer."""
    if method.client_streaming:
        # Not over grpc.aio, which says INTERNAL of its own when a call ends before all is written.
        return await asyncio.to_thread(told_of_stream, site.blocking, method, sent, metadata)
    channel: Any = site.channel
    open_ = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = open_(path_of(method))(sent[0], metadata=metadata, timeout=CALL_SECONDS)
    try:
        if not method.server_streaming:
            await call
            return None
        for _ in range(5):
            if await call.read() is aio.EOF:
                break
    except aio.AioRpcError as error:
        return problem_of(error)
    finally:
        call.cancel()
    return None


def told_of_stream(channel: Any, method: MethodDescriptor, sent: list[bytes], metadata: Any) -> str | None:
    try:
        if not method.server_streaming:
            channel.stream_unary(path_of(method))(iter(sent), metadata=metadata, timeout=CALL_SECONDS)
            return None
        answers = channel.stream_stream(path_of(method))
        for _ in answers(iter(sent), metadata=metadata, timeout=CALL_SECONDS):
            pass
    except grpc.RpcError as error:
        return problem_of(error)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One call, ready to be made."""

    service: str
    method: MethodDescriptor
    sent: list[bytes]
    metadata: Any

    async def wrong_answer(self, sites: Sites) -> str | None:
        """Make it; return what is wrong with the answer, with what it takes to see it again."""
        problem = await told(sites.of[self.service], self.method, self.sent, self.metadata)
        if problem is None:
            return None
        kind = GetMessageClass(self.method.input_type)
        shown = [str(kind.FromString(data))[:600] if decodes(kind, data) else data for data in self.sent]
        return f"{self.service} {path_of(self.method)} {problem}\n{self.metadata}\n{shown}"


def attempts(fuzzer: Fuzzer, sites: Sites, service: str) -> Iterator[Attempt]:
    """Draw a call of each method of a service."""
    credentials = sites.credentials()
    draw = fuzzer.random
    for method in [*described_methods(service), *OTHERS]:
        kind = GetMessageClass(method.input_type)
        number = draw.choice((0, 1, 1, 3)) if method.client_streaming else 1
        sent = [fuzzer.raw() if draw.random() < 0.1 else fuzzer.request(kind) for _ in range(number)]
        secret = draw.choice(credentials)
        if "worker" in method.full_name and draw.random() < 0.8:
            secret = (("authorization", f"Bearer {sites.keys.worker_key}"),)
        metadata = (*secret, *fuzzer.metadata())
        yield Attempt(service=service, method=method, sent=sent, metadata=metadata)


async def fuzzed(sites: Sites, seed: int, rounds: int) -> list[str]:
    """Call every method `rounds` times; return what went wrong."""
    fuzzer = Fuzzer(seed, await seeded(sites))
    # Few at a time: what is refused because others run tells nothing.
    limiter = asyncio.Semaphore(3)

    async def made(attempt: Attempt) -> str | None:
        async with limiter:
            return await attempt.wrong_answer(sites)

    wrong: list[str | None] = []
    for _ in range(rounds):
        drawn = [attempt for service in SERVICES for attempt in attempts(fuzzer, sites, service)]
        wrong += await asyncio.gather(*(made(attempt) for attempt in drawn))
    return [problem for problem in wrong if problem is not None]


def decodes(kind: Any, data: bytes) -> bool:
    try:
        kind.FromString(data)
    except Exception:
        return False
    return True


async def check(home: Path, seed: int, rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    async with served(home) as sites:
        wrong = await fuzzed(sites, seed, rounds)
        # The services are whole: each answers, and a usual call does what it did before.
        name = f"after-{uuid.UUID(int=seed).hex[:8]}"
        create = data_service_pb2.CreateDatasetRequest(parent="projects/default", dataset_id=name)
        path = "/luthier.v1.DataService/CreateDataset"
        answer = await sites.call("data", path, create.SerializeToString(), sites.keys.api_key)
        assert dataset_pb2.Dataset.FromString(answer).name == f"projects/default/datasets/{name}"
    traces = [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert wrong == [], f"{len(wrong)} answers are wrong; the first:\n{wrong[0]}"
    assert traces == []


async def test_no_request_is_answered_with_internal_or_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await check(tmp_path / "home", seed=14, rounds=8, caplog=caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_no_request_is_answered_with_internal_or_unknown_at_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    await check(tmp_path / "home", seed=seed, rounds=40, caplog=caplog)
