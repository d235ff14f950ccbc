"""Who may call a method, and what a principal may name."""

from __future__ import annotations

import logging
import re
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from tests.runtime.conftest import SERVICE as ECHO
from tests.runtime.conftest import MemoryRequestLog, Site, serve

from luthier.errors import InvalidArgument, PermissionDenied, Reason
from luthier.runtime import auth
from luthier.runtime.auth import Authenticator, Principal, confine, permit
from luthier.runtime.calls import Call
from luthier.runtime.door import admit
from luthier.runtime.keys import read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.named_resources import references_of
from luthier.runtime.policies import Rule, policy_for
from luthier.runtime.server import Registration, ServerOptions, of_families, serving
from luthier.v1 import (
    data_service_pb2,
    evaluation_pb2,
    evaluation_service_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2,
)

SERVICE = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
NAMES = [method.name for method in SERVICE.methods]
OURS = Principal(kind="key", subject="k", roles=frozenset({"reader"}), projects=frozenset({"ours"}))
BY_PARENT = Rule(roles=frozenset({"reader"}), subject="parent")


async def nothing(request: Any, context: Any) -> Any:
    raise AssertionError("nobody calls it")


@pytest.mark.parametrize("lost", [None, "GetModel", "WatchModel"])
async def test_a_method_without_a_policy_cannot_be_registered(tmp_path: Path, lost: str | None) -> None:
    policy = {
        path: rule for path, rule in policy_for(SERVICE, "reader").items() if path.rsplit("/")[-1] != lost
    }
    methods = SimpleNamespace(**dict.fromkeys(NAMES, nothing))
    add = model_service_pb2_grpc.add_ModelServiceServicer_to_server
    served = serving(
        ServerOptions(address="127.0.0.1:0", drain_seconds=0.0),
        [of_families(SERVICE, add, [methods])],
        authenticator=Authenticator(read_or_create_keys(tmp_path)),
        policy=policy,
        request_log=MemoryRequestLog(),
        metrics=MetricsServer("127.0.0.1:0"),
    )
    if lost is None:
        async with served as running:
            assert running.port
        return
    with pytest.raises(AssertionError, match=f"must have a policy.*/{SERVICE.full_name}/{lost}'"):
        async with served:
            pass


async def test_a_service_that_does_not_tell_its_methods_cannot_be_registered(tmp_path: Path) -> None:
    def add(servicer: Any, server: Any) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {}),))

    served = serving(
        ServerOptions(address="127.0.0.1:0", drain_seconds=0.0),
        [Registration(add=add, servicer=None, name="a.B")],
        authenticator=Authenticator(read_or_create_keys(tmp_path)),
        policy={},
        request_log=MemoryRequestLog(),
        metrics=MetricsServer("127.0.0.1:0"),
    )
    with pytest.raises(AssertionError, match="tell their methods"):
        async with served:
            pass


def test_a_method_that_no_policy_names_is_for_nobody() -> None:
    with pytest.raises(PermissionDenied, match="with the roles reader may not call /a/B, nobody may"):
        permit(OURS, "/a/B", {})


def evaluation(*models: str) -> evaluation_service_pb2.CreateEvaluationRequest:
    request = evaluation_service_pb2.CreateEvaluationRequest(parent="projects/ours")
    request.evaluation.dataset_version = "projects/ours/datasets/d/versions/v"
    request.evaluation.arms.extend(evaluation_pb2.EvaluationArm(model=model) for model in models)
    return request


def test_every_reference_of_another_project_is_named() -> None:
    confine(OURS, evaluation("projects/ours/models/a", "not a name at all"), BY_PARENT)
    theirs = evaluation("projects/ours/models/a", "projects/x/models/b", "projects/y/models/c")
    with pytest.raises(InvalidArgument) as caught:
        confine(OURS, theirs, BY_PARENT)
    assert caught.value.reason == Reason.CROSS_PROJECT_REFERENCE
    assert [(one.field, one.description) for one in caught.value.violations] == [
        ("evaluation.arms[1].model", "must be in projects/ours, got 'projects/x/models/b'"),
        ("evaluation.arms[2].model", "must be in projects/ours, got 'projects/y/models/c'"),
    ]


def test_what_a_request_names_where_its_subject_is_no_name_is_looked_at_all_the_same() -> None:
    request = evaluation("projects/x/models/b")
    request.parent = "projects/-"
    with pytest.raises(PermissionDenied, match="no access to projects/x"):
        confine(OURS, request, BY_PARENT)


def test_references_are_found_in_maps_and_in_types_that_hold_themselves() -> None:
    request = training_service_pb2.CreateFineTuningJobRequest(parent="projects/ours")
    multi = request.fine_tuning_job.reinforcement.grader.multi
    multi.graders["a"].multi.graders["b"].reward_model.model = "projects/x/models/b"
    with pytest.raises(InvalidArgument) as caught:
        confine(OURS, request, BY_PARENT)
    assert [one.field for one in caught.value.violations] == [
        "fine_tuning_job.reinforcement.grader.multi.graders['a'].multi.graders['b'].reward_model.model"
    ]


def nested(size: int, key: str) -> training_service_pb2.CreateFineTuningJobRequest:
    """A request of so many graders below a map's key, each of which names a model of another project."""
    request = training_service_pb2.CreateFineTuningJobRequest(parent="projects/ours")
    outer = request.fine_tuning_job.reinforcement.grader.multi
    inner = outer.graders[key].multi
    for place in range(size):
        inner.graders[str(place)].reward_model.model = "projects/x"
    return request


@pytest.mark.parametrize(
    "look", [lambda request: confine(OURS, request, BY_PARENT), admit], ids=["confine", "admit"]
)
def test_a_long_key_of_many_graders_is_held_and_copied_once(look: Callable[[Any], None]) -> None:
    request = nested(40_000, "k" * (1 << 20))
    request.fine_tuning_job.reinforcement.grader.multi.graders["z"].name = "z"
    # A copy of the key for each would be 40 GiB.
    tracemalloc.start()
    began = time.process_time()
    try:
        with suppress(InvalidArgument):
            look(request)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 16 << 20
    assert time.process_time() - began < 5.0


def test_the_walk_for_references_ends_where_an_answer_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    walked = 0

    def counted(request: Message, subject: str) -> Iterator[tuple[tuple[str, ...], str]]:
        nonlocal walked
        for one in references_of(request, subject):
            walked += 1
            yield one

    monkeypatch.setattr(auth, "references_of", counted)
    with pytest.raises(InvalidArgument) as caught:
        confine(OURS, nested(1000, "k" * 1000), BY_PARENT)
    assert walked == 20
    shown = f"graders['{'k' * 100}…']"
    assert all(shown in one.field and len(one.field) < 270 for one in caught.value.violations)


def test_no_more_references_are_named_than_an_answer_has_room_for() -> None:
    with pytest.raises(InvalidArgument) as caught:
        confine(OURS, evaluation(*["projects/x/models/b"] * 1000), BY_PARENT)
    assert len(caught.value.violations) == 20


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (data_service_pb2.CreateDatasetRequest(parent="projects/theirs"), "PERMISSION_DENIED"),
        (evaluation("projects/theirs/models/a"), "INVALID_ARGUMENT"),
    ],
    ids=["another project", "crossing"],
)
async def test_the_log_says_what_a_refused_call_was_about(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    request_: Any,
    code: str,
) -> None:
    # A library that another test uses switches off the loggers that are there when it sets up its own.
    monkeypatch.setattr(logging.getLogger("luthier.access"), "disabled", False)
    caplog.set_level("INFO", "luthier.access")
    async with serve(tmp_path / "home", projects=("ours",), request_type=type(request_)) as site:
        call: Any = site.wire.unary_unary(f"/{ECHO}/Create")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(request_.SerializeToString(), metadata=site.metadata(), timeout=10)
    (line,) = [one for one in caplog.records if one.name == "luthier.access"]
    said: dict[str, Any] = vars(line)
    assert (said["code"], said["subject"]) == (code, request_.parent)


WRITE = Rule(roles=frozenset({"writer"}), subject="name")


def test_a_request_that_does_not_say_what_it_is_about_is_refused_and_told_what_would_be_right() -> None:
    for request, rule, form in (
        (
            data_service_pb2.CreateDatasetRequest(),
            BY_PARENT,
            "projects/{project}, or the name of what is in one",
        ),
        (data_service_pb2.WriteUploadRequest(), WRITE, "projects/{project}/uploads/{upload}"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            confine(OURS, request, rule)
        (violation,) = caught.value.violations
        assert (violation.field, violation.reason) == (rule.subject, Reason.FIELD_REQUIRED)
        assert violation.description == f"must say what the call is about: {form}, got ''"


def test_of_a_stream_only_the_first_message_must_say_what_it_is_about() -> None:
    confine(OURS, data_service_pb2.WriteUploadRequest(), WRITE, is_first=False)
    foreign = data_service_pb2.WriteUploadRequest(name="projects/theirs/uploads/u")
    with pytest.raises(PermissionDenied, match="no access to projects/theirs"):
        confine(OURS, foreign, WRITE, is_first=False)


def test_what_is_about_no_resource_is_looked_at_name_by_name() -> None:
    rule = Rule(roles=frozenset({"reader"}), subjectless="for this test")
    confine(OURS, evaluation("projects/ours/models/a"), rule)
    with pytest.raises(PermissionDenied, match="no access to projects/x"):
        confine(OURS, evaluation("projects/ours/models/a", "projects/x/models/b"), rule)


async def test_a_call_about_nothing_comes_to_no_servicer_and_the_log_says_what_others_are_about(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("luthier.access"), "disabled", False)
    caplog.set_level("INFO", "luthier.access")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.create(data_service_pb2.CreateDatasetRequest(dataset_id="d"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "parent: must say what the call is about" in str(caught.value.details())
    assert site.echo.calls == 0
    await site.create(data_service_pb2.CreateDatasetRequest(parent="projects/p"))
    lines: list[dict[str, Any]] = [vars(one) for one in caplog.records if one.name == "luthier.access"]
    assert [line.get("subject") for line in lines] == [None, "projects/p"]
    assert [line.get("project") for line in lines] == [None, "p"]


async def test_a_call_that_no_stage_has_authorised_is_not_served(tmp_path: Path) -> None:
    nobody: Any = None
    call = Call(
        method="/a/B",
        type="unary",
        context=nobody,
        messages=of_one(data_service_pb2.CreateDatasetRequest(parent="projects/ours").SerializeToString()),
        streams_requests=False,
        deserialize=data_service_pb2.CreateDatasetRequest.FromString,
        task=None,
    )
    with pytest.raises(AssertionError, match="no stage has said what /a/B may be about"):
        await call.receive()


async def of_one(data: bytes) -> AsyncIterator[bytes]:
    yield data


def test_projects_are_looked_at_by_the_one_stage_alone() -> None:
    """Whoever knows a caller, refuses one, or is given projects could check them again, by another rule."""
    source = Path(auth.__file__).parents[1]
    files = {str(path.relative_to(source)): path.read_text() for path in source.rglob("*.py")}

    def of(pattern: str) -> set[str]:
        return {name for name, text in files.items() if re.search(pattern, text)}

    stage = {"runtime/auth.py", "runtime/interceptors.py"}
    # Who found a key out before the stages hands on whose it is, and looks at its kind alone.
    handing_on = {"runtime/calls.py", "runtime/shedding.py"}
    assert of(r"\bconfine\(|\bpermit\(") == stage
    assert of(r"\bPrincipal\b") == stage | handing_on
    assert not handing_on & of(r"\.(projects|roles|resources)\b")
    assert of(r"\.caller\b") == {"runtime/interceptors.py"}
    assert of(r"\bPermissionDenied\(") == {"runtime/auth.py"}
    # Who asks only who calls: to keep answers apart, and to share out room.
    who = {"runtime/auth.py", "runtime/idempotency.py", "runtime/admission.py", "data/shard_files.py"}
    assert of(r"\bcurrent_principal\b") == who
    settings = {f"{service}/__main__.py" for service in ("data", "training", "evaluation")}
    told = {"work/host.py", "daemon/doctor.py", "runtime/granted_keys.py"}
    assert of(r"\.projects\b|\b_projects\b") == stage | settings | told
    logged = re.findall(r".*\.projects\b.*", files["runtime/interceptors.py"])
    assert [line.strip() for line in logged] == ['with bind(project=", ".join(principal.projects or ())):']
