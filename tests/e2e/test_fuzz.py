"""Whatever a caller sends, it is told what was wrong with it: never INTERNAL, never UNKNOWN, never silence."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.e2e.conftest import SERVICES, described_methods, free_ports, path_of
from tests.e2e.fuzz_calls import Site, told
from tests.e2e.fuzzing import Fuzzer
from tests.golden.answers import read_answers
from tests.golden.home_files import unpack_home

from luthier.data import __main__ as data
from luthier.data.config import Config as DataConfig
from luthier.evaluation import __main__ as evaluation
from luthier.evaluation.config import Config as EvaluationConfig
from luthier.runtime.auth import HOLDER, TaskTokens
from luthier.runtime.calls import StagedMethods
from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.storage.disk import MIN_FREE_BYTES
from luthier.storage.opening import open_stores
from luthier.training import __main__ as training
from luthier.training.config import Config as TrainingConfig
from luthier.v1 import (
    data_service_pb2,
    dataset_pb2,
    evaluation_service_pb2,
    model_alias_pb2,
    model_pb2,
    model_service_pb2,
    training_service_pb2,
)
from luthier.work.host import hosting
from luthier.worker.v1 import hold_service_pb2, task_pb2, worker_service_pb2

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "homes").iterdir())[-1]
"""A home with models, versions and renderings that are READY, and whatever else was made of them."""
HOLDS = hold_service_pb2.DESCRIPTOR.services_by_name["HoldService"]
METHODS = [(service, method) for service in SERVICES for method in described_methods(service)]
DEEP = {
    *("PreviewRendering", "ReadRendering", "ListRecords", "CreateDatasetVersion", "CreateRendering"),
    *("PlanFineTuningJob", "CreateFineTuningJob", "ReadFineTuningJobMetrics", "MergeModel", "ListModelFiles"),
    *("CreateEvaluation", "ListPredictions", "GetModelAlias", "MoveModelAlias", "ListRollouts"),
    *("CreateHold", "ReleaseHold"),
}
"""Methods that only do something where there is something, all of which some request gets so far."""
OTHERS = [
    method
    for file, service in (
        (health_pb2, "Health"),
        (reflection_pb2, "ServerReflection"),
    )
    for method in file.DESCRIPTOR.services_by_name[service].methods
]


@dataclass
class Sites:
    """Three services in this process, and a line to each."""

    keys: Keys
    of: dict[str, Site]

    def credentials(self) -> list[tuple[tuple[str, str], ...]]:
        tokens = TaskTokens(self.keys.token_secret)
        ours = tokens.mint("default", ("projects/default/datasets/d",), 1, "t", 600)
        foreign = tokens.mint("other", ("projects/other",), 1, "t", 600)
        holder = tokens.mint("other", ("projects/other",), 0, HOLDER, 600)
        secrets = [*(self.keys.api_key,) * 6, *(self.keys.worker_key,) * 2, ours, foreign, holder, "lk_wrong"]
        return [(("authorization", f"Bearer {secret}"),) for secret in secrets] + [()]

    def credential_for(self, method: MethodDescriptor) -> tuple[tuple[str, str], ...]:
        """Return one that may call a method about what is in the default project."""
        if method.containing_service == HOLDS:
            tokens = TaskTokens(self.keys.token_secret)
            secret = tokens.mint("default", ("projects/default",), 0, HOLDER, 600)
        else:
            secret = self.keys.worker_key if "worker" in method.full_name else self.keys.api_key
        return (("authorization", f"Bearer {secret}"),)

    async def call(self, service: str, path: str, data: bytes, secret: str) -> bytes:
        call: Any = self.of[service].channel.unary_unary(path)
        return bytes(await call(data, metadata=(("authorization", f"Bearer {secret}"),), timeout=20))


@asynccontextmanager
async def served(home: Path, min_free_bytes: int = MIN_FREE_BYTES) -> AsyncIterator[Sites]:
    addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
    shared: dict[str, Any] = {
        "home": home,
        "log_level": "INFO",
        "projects": ("default", "other"),
        "data_address": addresses[0],
        "training_address": addresses[1],
        "metrics_address": "127.0.0.1:0",
        "min_free_bytes": min_free_bytes,
    }
    rewarded = {**shared, "reward_addresses": ("127.0.0.1",)}
    # A golden home has its stores in itself, wherever those of other tests are.
    data_config, training_config = DataConfig(**shared), TrainingConfig(**rewarded)
    judged = {**rewarded, "judge_addresses": ("127.0.0.1",), "judge_keys": ()}
    evaluation_config = EvaluationConfig(**judged, evaluation_address=addresses[2])
    async with AsyncExitStack() as stack:
        for settings, build in (
            (data.settings_of(data_config), lambda parts: data.build(parts, data_config)),
            (training.settings_of(training_config), lambda parts: training.build(parts, training_config)),
            (
                evaluation.settings_of(evaluation_config),
                lambda parts: evaluation.build(parts, evaluation_config),
            ),
        ):
            await stack.enter_async_context(hosting(settings, build, open_stores))
        of = {
            name: Site(
                await stack.enter_async_context(aio.insecure_channel(address)),
                stack.enter_context(grpc.insecure_channel(address)),
            )
            for name, address in zip(SERVICES, addresses, strict=True)
        }
        yield Sites(read_or_create_keys(home), of)


def meant(home: Path) -> tuple[list[str], list[Message]]:
    """Return the names of all that is in a golden home, and requests that meant something there."""
    recorded = read_answers(GOLDEN, home)
    methods = {path_of(method): method for _, method in METHODS}
    requests: list[Message] = []
    for one in recorded:
        kind = GetMessageClass(methods[f"/{one['rpc']}"].input_type)
        request = json_format.ParseDict(one["request"], kind(), ignore_unknown_fields=True)
        for known in request.DESCRIPTOR.fields:
            if known.name.endswith("_id"):  # there is something of that name already
                request.ClearField(known.name)
        requests.append(request)
    names = sorted(set(re.findall(r'"(projects/[^"/ ]+(?:/[^"/ ]+)*)"', json.dumps(recorded))))
    return names, [*requests, *_later_requests(), *_holding_requests()]


def _later_requests() -> Iterator[Message]:
    """Yield requests of what came after the golden home."""
    parent, model = "projects/default", "projects/default/models/taught-model"
    yield model_service_pb2.MergeModelRequest(name=model)
    yield model_service_pb2.ExportModelRequest(name=model, format=model_pb2.EXPORT_FORMAT_GGUF_F16)
    generate = evaluation_service_pb2.GenerateTextRequest(model=model, max_new_tokens=2)
    generate.conversation.messages.add(role="user", content="hello")
    yield generate
    yield evaluation_service_pb2.GenerateTextRequest(model="projects/default/models/tiny", prompt="hello")
    grade = evaluation_service_pb2.GradeSamplesRequest(parent=parent)
    grade.grader.regex.input, grade.grader.regex.pattern = "{{sample.output_text}}", "^a"
    grade.samples.add(output_text="abc")
    yield grade
    alias = evaluation_service_pb2.CreateModelAliasRequest(parent=parent, model_alias_id="production")
    alias.model_alias.gates.add()
    yield alias
    yield evaluation_service_pb2.MoveModelAliasRequest(name=f"{parent}/modelAliases/made", model=model)
    yield evaluation_service_pb2.GetModelAliasRequest(name=f"{parent}/modelAliases/made")
    jobs = f"{parent}/fineTuningJobs"
    yield training_service_pb2.ListRolloutsRequest(parent=f"{jobs}/taught", page_size=3, step=2)
    yield training_service_pb2.ListFineTuningJobEventsRequest(parent=f"{jobs}/taught", page_size=3)


def _holding_requests() -> Iterator[Message]:
    """Yield what services ask of one another; who has no such collection says that there is none."""
    held = (
        "datasets/things/versions/v1",
        "renderings/chat",
        "models/tiny",
        "fineTuningJobs/taught/checkpoints/step-3",
    )
    for number, resource in enumerate(held):
        name, hold = f"projects/default/{resource}", str(uuid.UUID(int=number))
        holder = "projects/default/evaluations/of-another"
        yield hold_service_pb2.CreateHoldRequest(name=name, hold=hold, holder=holder, seconds=60.0)
        yield hold_service_pb2.ReleaseHoldRequest(name=name, hold=hold)


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
    names += [f"projects/default/fineTuningJobs/{one}" for one in ("m/checkpoints/1", "taught/rollouts/1")]
    alias = evaluation_service_pb2.CreateModelAliasRequest(parent="projects/default", model_alias_id="made")
    path = "/luthier.v1.EvaluationService/CreateModelAlias"
    await sites.call("evaluation", path, alias.SerializeToString(), api)
    names += [f"projects/default/modelAliases/{one}" for one in ("made", "none")]
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


def fuzzed_methods(service: str) -> list[MethodDescriptor]:
    return [*described_methods(service), *OTHERS]


def attempts(fuzzer: Fuzzer, sites: Sites, service: str) -> Iterator[Attempt]:
    """Draw a call of each method of a service."""
    credentials = sites.credentials()
    draw = fuzzer.random
    for method in fuzzed_methods(service):
        kind = GetMessageClass(method.input_type)
        number = draw.choice((0, 1, 1, 3)) if method.client_streaming else 1
        sent = [fuzzer.raw() if draw.random() < 0.1 else fuzzer.request(kind) for _ in range(number)]
        secret = draw.choice(credentials)
        if "worker" in method.full_name and draw.random() < 0.8:
            secret = sites.credential_for(method)
        metadata = (*secret, *fuzzer.metadata())
        yield Attempt(service=service, method=method, sent=sent, metadata=metadata)


async def asked_as_meant(sites: Sites, requests: list[Message]) -> list[str | None]:
    """Make each request that means something as it is: what is drawn from them comes as far; return what went wrong."""
    found = []
    for request in requests:
        kind = request.DESCRIPTOR.full_name
        for service, method in METHODS:
            if method.input_type.full_name == kind and not method.name.startswith("Watch"):
                metadata, sent = sites.credential_for(method), [request.SerializeToString()]
                attempt = Attempt(service=service, method=method, sent=sent, metadata=metadata)
                found.append(await attempt.wrong_answer(sites))
    return found


async def fuzzed(sites: Sites, home: Path, seed: int, rounds: int) -> list[str]:
    """Call every method `rounds` times; return what went wrong."""
    names, requests = meant(home)
    fuzzer = Fuzzer(seed, [*await seeded(sites), *names], requests)
    wrong = await asked_as_meant(sites, requests)
    # Few at a time: what is refused because others run tells nothing.
    limiter = asyncio.Semaphore(3)

    async def made(attempt: Attempt) -> str | None:
        async with limiter:
            return await attempt.wrong_answer(sites)

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


async def check_whole(sites: Sites, name: str) -> None:
    """Each service does what it is usually asked, and writes."""
    parent = "projects/default"
    register = model_service_pb2.RegisterBaseModelRequest(parent=parent, model_id=name)
    register.model.hub.repo_id = "a/b"
    alias = evaluation_service_pb2.CreateModelAliasRequest(parent=parent, model_alias_id=name)
    usual: list[tuple[str, str, Message, type[Message], str]] = [
        (
            "data",
            "/luthier.v1.DataService/CreateDataset",
            data_service_pb2.CreateDatasetRequest(parent=parent, dataset_id=name),
            dataset_pb2.Dataset,
            "datasets",
        ),
        ("training", "/luthier.v1.ModelService/RegisterBaseModel", register, model_pb2.Model, "models"),
        (
            "evaluation",
            "/luthier.v1.EvaluationService/CreateModelAlias",
            alias,
            model_alias_pb2.ModelAlias,
            "modelAliases",
        ),
    ]
    assert [service for service, *_ in usual] == list(SERVICES)
    for service, path, request, kind, family in usual:
        answer: Any = kind.FromString(
            await sites.call(service, path, request.SerializeToString(), sites.keys.api_key)
        )
        assert answer.name == f"{parent}/{family}/{name}"


async def check(home: Path, seed: int, rounds: int, caplog: pytest.LogCaptureFixture) -> None:
    await asyncio.to_thread(unpack_home, GOLDEN, home)
    async with served(home) as sites:
        wrong = await fuzzed(sites, home, seed, rounds)
        answered = {name for site in sites.of.values() for name in site.answered}
        assert answered >= DEEP, f"nothing was asked of {sorted(DEEP - answered)} that could be done"
        await check_whole(sites, f"after-{seed}")
    traces = [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert wrong == [], f"{len(wrong)} answers are wrong; the first:\n{wrong[0]}"
    assert traces == []


@pytest.fixture
def served_methods(monkeypatch: pytest.MonkeyPatch) -> dict[StagedMethods, set[str]]:
    """The paths of all methods that servers take, in the order in which they begin."""
    served: dict[StagedMethods, set[str]] = {}
    add = StagedMethods.add

    def noted(self: StagedMethods, name: str, handler: Any) -> Any:
        served.setdefault(self, set()).add(name)
        return add(self, name, handler)

    monkeypatch.setattr(StagedMethods, "add", noted)
    return served


async def test_no_request_is_answered_with_internal_or_unknown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, served_methods: dict[StagedMethods, set[str]]
) -> None:
    await check(tmp_path, seed=14, rounds=8, caplog=caplog)
    fuzzed = [{path_of(method) for method in fuzzed_methods(service)} for service in SERVICES]
    assert list(served_methods.values()) == fuzzed, "what is served must be fuzzed, all of it"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_no_request_is_answered_with_internal_or_unknown_at_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    await check(tmp_path, seed=seed, rounds=40, caplog=caplog)
