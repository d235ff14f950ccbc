"""Every RPC of every service: what a key may call, and the projects of everything that its requests name."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from tests.e2e.conftest import SERVICES, described_methods, path_of
from tests.e2e.naming import Place, empty, places, texts
from tests.e2e.test_fuzz import Sites, served

from luthier.data.servicer import POLICY as DATA
from luthier.errors import InvalidArgument, LuthierError, PermissionDenied, Reason
from luthier.evaluation.servicer import POLICY as EVALUATION
from luthier.runtime.auth import HOLDER, TaskTokens
from luthier.runtime.granted_keys import KEY_ROLES, grant_key
from luthier.training.jobs.servicer import POLICY as JOBS
from luthier.training.models.servicer import POLICY as MODELS
from luthier.v1 import data_service_pb2
from luthier.work.hold_servicer import POLICY as HOLD_POLICY
from luthier.work.peers import error_of
from luthier.work.servicer import POLICY as WORKER_POLICY

METHODS = [(service, method) for service in SERVICES for method in described_methods(service)]
PUBLIC = [(service, method) for service, method in METHODS if method.full_name.startswith("luthier.v1.")]
HELD = [(service, method) for service, method in METHODS if method.containing_service.name == "HoldService"]
READING = ("Get", "List", "Watch", "Read", "Preview", "Plan", "Download")
GENERATING = ("Generate", "Score", "Grade")
FOR_TASKS = {
    *("GetDatasetVersion", "ReadRecords", "GetRendering", "ReadRendering"),
    *("GetFineTuningJob", "GetModel", "ListModelFiles", "DownloadModelFile"),
}
THERE = "datasets/there/versions/v"
"""What a name goes on with: whether it can be is looked at after whether it may be."""


def verb_of(method: MethodDescriptor) -> str:
    match = re.match(r"[A-Z][a-z]+", method.name)
    assert match is not None
    return match.group()


def role_of(method: MethodDescriptor) -> str:
    """The role that a method must need, by its name alone."""
    verb = verb_of(method)
    return "reader" if verb in READING else "generator" if verb in GENERATING else "writer"


class Callers:
    """Three services of two projects, and keys for them."""

    def __init__(self, sites: Sites, keys: dict[str, str]) -> None:
        self._sites = sites
        self._tokens = TaskTokens(sites.keys.token_secret)
        self.keys = {"api": sites.keys.api_key, "worker": sites.keys.worker_key, **keys}

    def token(self, project: str, resource: str, task: str = "t1") -> str:
        return self._tokens.mint(project, (resource,), 1, task, 60)

    async def uploading(self, method: MethodDescriptor, start: data_service_pb2.StartUploadRequest) -> str:
        """Start an upload with the key of the project `other`; return its name."""
        data = start.SerializeToString()
        answer = await self._sites.call("data", path_of(method), data, self.keys["theirs"])
        return type(start.upload).FromString(answer).name

    async def refusal(
        self, service: str, method: MethodDescriptor, secret: str, *messages: Message
    ) -> LuthierError | None:
        """Why a call fails; None when it does not, or not at once."""
        bodies = [message.SerializeToString() for message in messages]
        options: Any = {"metadata": (("authorization", f"Bearer {secret}"),), "timeout": 20}
        # On the wire one message is a stream of one; sent as such, gRPC may fail to write what was refused before.
        channel: Any = self._sites.of[service].channel
        if len(bodies) == 1:
            running = channel.unary_stream(path_of(method))(bodies[0], **options)
        else:
            running = channel.stream_stream(path_of(method))(iter(bodies), **options)
        try:
            async for _ in running:
                break
        except grpc.aio.AioRpcError as error:
            return error_of(error)
        finally:
            running.cancel()
        return None


@pytest.fixture
async def callers(tmp_path: Path) -> AsyncIterator[Callers]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    keys: dict[str, str] = {role: grant_key(home, role, ["*"], [role]) for role in sorted(KEY_ROLES)}
    keys["theirs"] = grant_key(home, "theirs", ["other"], KEY_ROLES)
    keys["nobody"] = grant_key(home, "nobody", ["elsewhere"], KEY_ROLES)
    async with served(home) as sites:
        yield Callers(sites, keys)


def test_the_walk_finds_what_is_there() -> None:
    services = {method.containing_service.full_name for _, method in METHODS}
    assert services == {
        *("luthier.v1.DataService", "luthier.v1.TrainingService", "luthier.v1.ModelService"),
        *("luthier.v1.EvaluationService", "luthier.worker.v1.WorkerService", "luthier.worker.v1.HoldService"),
    }
    shown = {place.shown for _, method in PUBLIC for place in places(method)}
    assert {
        "name",
        "parent",
        "model",
        "dataset_version.sources[0].upload",
        "fine_tuning_job.mixed_renderings[0].rendering",
        "fine_tuning_job.reinforcement.grader.multi.graders['a'].reward_model.model",
        "evaluation.judges[0].model",
        "evaluation.arms[0].model",
    } <= shown


@pytest.mark.parametrize(("service", "method"), PUBLIC, ids=lambda one: getattr(one, "name", one))
def test_every_request_names_what_it_is_about_in_fields_that_say_so(
    service: str, method: MethodDescriptor
) -> None:
    found = places(method)
    assert found, f"{service}: no project can be told from a request of {method.name}"
    assert sum(place.is_subject for place in found) <= 1, "a request is about one thing"
    known = {place.path for place in found}
    names = {"rendering", "start_from", "base_model", "model", "evaluation", "upload"}
    names |= {"dataset_version", "dataset", "fine_tuning_job", "checkpoint", "tuned_model"}
    # A judge's endpoint has the name of a model of somebody else.
    unsaid = [
        str(place)
        for place in texts(method)
        if place.path[-1].name in names
        and place.path not in known
        and place.path[-1].full_name != "luthier.v1.JudgeEndpoint.model"
    ]
    assert unsaid == []


async def test_a_key_of_another_project_is_refused_for_every_field_that_names_a_resource(
    callers: Callers,
) -> None:
    wrong = []
    for service, method in PUBLIC:
        found = places(method)
        subjects = [place for place in found if place.is_subject]
        for place in found:
            request = empty(method)
            if subjects and not place.is_subject:
                subjects[0].put(request, f"projects/other/{THERE}")
            place.put(request, f"projects/default/{THERE}")
            told = await callers.refusal(service, method, callers.keys["theirs"], request)
            if not subjects or place.is_subject:
                right = isinstance(told, PermissionDenied) and told.message == "no access to projects/default"
            else:
                right = crosses(told, place)
            if not right:
                wrong.append(f"{place}: {told!r}")
    assert wrong == []


def crosses(told: LuthierError | None, place: Place) -> bool:
    said = f"must be in projects/other, got 'projects/default/{THERE}'"
    return (
        isinstance(told, InvalidArgument)
        and told.reason == Reason.CROSS_PROJECT_REFERENCE
        and told.message == f"{place.shown}: {said}"
    )


async def test_no_reference_leaves_the_project_that_a_request_is_about(callers: Callers) -> None:
    wrong = []
    for service, method in PUBLIC:
        found = places(method)
        subjects = [place for place in found if place.is_subject]
        for place in found:
            if not subjects or place.is_subject:
                continue
            request = empty(method)
            subjects[0].put(request, f"projects/other/{THERE}")
            place.put(request, f"projects/default/{THERE}")
            told = await callers.refusal(service, method, callers.keys["api"], request)
            if not crosses(told, place):
                wrong.append(f"{place}: {told!r}")
    assert wrong == []


def test_every_method_says_what_it_is_about_or_why_it_is_about_nothing() -> None:
    """Those that are about nothing stand here too: each is looked at by whoever adds one."""
    policies = {**DATA, **JOBS, **MODELS, **EVALUATION, **WORKER_POLICY, **HOLD_POLICY}
    assert policies.keys() == {path_of(method) for _, method in METHODS}
    wrong = []
    for _, method in METHODS:
        rule, found = policies[path_of(method)], places(method)
        subjects = [place.shown for place in found if place.is_subject]
        required = [place.shown for place in found if place.is_required]
        if not rule.subjectless and [rule.subject] != (subjects or required):
            wrong.append(f"{method.full_name} is about {rule.subject!r}, it has {subjects or required}")
        if bool(rule.subjectless) != (method.containing_service.name == "WorkerService"):
            wrong.append(f"{method.full_name} is about nothing: {rule.subjectless!r}")
    assert wrong == []


async def test_a_request_about_nothing_is_refused(callers: Callers) -> None:
    wrong = []
    for service, method in (*PUBLIC, *HELD):
        secret = callers.keys["api"]
        if (service, method) in HELD:
            secret = callers.token("default", "projects/default/models/m", HOLDER)
        told = await callers.refusal(service, method, secret, empty(method))
        said = f"{first_of(method).shown}: must say what the call is about: projects/{{project}}"
        is_right = isinstance(told, InvalidArgument) and told.reason == Reason.FIELD_REQUIRED
        if told is None or not is_right or not told.message.startswith(said):
            wrong.append(f"{method.full_name}: {told!r}")
    assert wrong == []


async def test_a_project_that_is_not_served_is_nobodys(callers: Callers) -> None:
    wrong = []
    for service, method in PUBLIC:
        place = first_of(method)
        for key, project in (("api", "nowhere"), ("nobody", "elsewhere"), ("nobody", "default")):
            request = named(place, f"projects/{project}/{THERE}")
            told = await callers.refusal(service, method, callers.keys[key], request)
            if not isinstance(told, PermissionDenied) or told.message != f"no access to projects/{project}":
                wrong.append(f"{place} of {project}: {told!r}")
    assert wrong == []


async def test_what_no_resource_can_have_as_a_name_is_of_no_project(callers: Callers) -> None:
    """A dash, which AIP-159 has for all collections, is none here."""
    wrong = []
    for service, method in PUBLIC:
        place = first_of(method)
        for malformed in (f"projects/-/{THERE}", "projects/-", f"Projects/other/{THERE}", "other", ""):
            told = await callers.refusal(service, method, callers.keys["theirs"], named(place, malformed))
            if not isinstance(told, InvalidArgument):
                wrong.append(f"{place} as {malformed!r}: {told!r}")
    assert wrong == []


def first_of(method: MethodDescriptor) -> Place:
    """What a request is about, or the one thing that it names."""
    found = places(method)
    return next((place for place in found if place.is_subject), found[0])


def named(place: Place, name: str) -> Message:
    request = empty(place.method)
    place.put(request, name)
    return request


async def test_every_method_needs_its_role(callers: Callers) -> None:
    wrong = []
    for service, method in PUBLIC:
        for role in sorted(KEY_ROLES):
            told = await callers.refusal(service, method, callers.keys[role], empty(method))
            refused = isinstance(told, PermissionDenied) and "may not call" in told.message
            if refused != (role != role_of(method)):
                wrong.append(f"{method.full_name} as {role}: {told!r}")
            if refused and f"only a key with the role {role_of(method)}" not in str(told):
                wrong.append(f"{method.full_name} does not say what it needs: {told!r}")
    assert wrong == []


async def test_internal_methods_are_for_no_key_and_public_ones_for_no_worker(callers: Callers) -> None:
    task = callers.token("default", "projects/default/models/m")
    wrong = []
    for service, method in METHODS:
        is_public = (service, method) in PUBLIC
        of_workers = method.containing_service.name == "WorkerService"
        allowed = {"api": is_public, "worker": of_workers, "task": is_public and method.name in FOR_TASKS}
        for who, may in allowed.items():
            secret = task if who == "task" else callers.keys[who]
            told = await callers.refusal(service, method, secret, empty(method))
            refused = isinstance(told, PermissionDenied) and "may not call" in told.message
            if refused == may:
                wrong.append(f"{method.full_name} by {who}: {told!r}")
    assert wrong == []


async def test_a_token_is_for_what_it_names_and_a_tasks_only_where_its_project_is_served(
    callers: Callers,
) -> None:
    wrong = []
    for service, method in METHODS:
        task = HOLDER if method.containing_service.name == "HoldService" else "t1"
        if task != HOLDER and method.name not in FOR_TASKS:
            continue
        for project, said in (("default", "the task may not touch"), ("nowhere", "no access to projects/")):
            own = f"projects/{project}/models/own"
            request = empty(method)
            subject = next(place for place in places(method) if place.is_subject)
            subject.put(request, "projects/default/models/ours" if project == "default" else own)
            told = await callers.refusal(service, method, callers.token(project, own, task), request)
            refused = isinstance(told, PermissionDenied) and said in told.message
            # Holds outlast the serving of their project.
            if refused == (task == HOLDER and project == "nowhere"):
                wrong.append(f"{method.full_name} of {project}: {told!r}")
    assert wrong == []


async def test_every_message_of_a_stream_is_looked_at(callers: Callers) -> None:
    service = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
    method = service.methods_by_name["WriteUpload"]
    write = data_service_pb2.WriteUploadRequest
    start = data_service_pb2.StartUploadRequest(parent="projects/other")
    start.upload.filename = "a.jsonl"
    upload = await callers.uploading(service.methods_by_name["StartUpload"], start)
    for foreign in ("projects/default/uploads/u", "projects/nowhere/uploads/u"):
        told = await callers.refusal(
            "data", method, callers.keys["theirs"], write(name=upload), write(name=foreign)
        )
        assert isinstance(told, PermissionDenied), foreign
        told = await callers.refusal("data", method, callers.keys["theirs"], write(name=foreign))
        assert isinstance(told, PermissionDenied), foreign
    assert await callers.refusal("data", method, callers.keys["theirs"], write(name=upload)) is None
