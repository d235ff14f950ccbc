"""What a client finds on its way to the services, and what is wrong with it: looked at without changing anything."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import grpc

from luthier.client.channels import open_channel
from luthier.client.config import ClientConfig, ConfigArguments, Sources, sources
from luthier.client.profiles import Profiles, read_profiles
from luthier.client.wire_errors import from_rpc_error, has_request_id
from luthier.errors import LuthierError, NotFound, PermissionDenied, Unauthenticated
from luthier.v1.data_service_pb2 import ListDatasetsRequest
from luthier.v1.data_service_pb2_grpc import DataServiceStub
from luthier.v1.evaluation_service_pb2 import ListEvaluationsRequest
from luthier.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from luthier.v1.training_service_pb2 import ListFineTuningJobsRequest
from luthier.v1.training_service_pb2_grpc import TrainingServiceStub

Level = Literal["ok", "warning", "problem"]
_ANSWER_SECONDS = 5.0
_APART_SECONDS = 5.0
_ABOUT_KEY, _VERSION_KEY, _TIME_KEY = "luthier-about", "luthier-version", "luthier-time"
_ASKED: Mapping[str, tuple[Callable[[grpc.Channel], Any], Callable[..., Any]]] = {
    "data": (lambda wire: DataServiceStub(wire).ListDatasets, ListDatasetsRequest),
    "training": (lambda wire: TrainingServiceStub(wire).ListFineTuningJobs, ListFineTuningJobsRequest),
    "evaluation": (lambda wire: EvaluationServiceStub(wire).ListEvaluations, ListEvaluationsRequest),
}
"""What each service is asked: for one resource, which changes nothing and needs a key that may read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: the thing.
        level: problem: calls will fail; warning: some may.
        text: what was found; of what is not ok, with what would be right.
    """

    what: str
    level: Level
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What came of asking a service. `ahead_seconds`: by how much its clock is ahead, `unsure_seconds` more or less."""

    finding: Finding
    version: str = ""
    ahead_seconds: float | None = None
    unsure_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key:
    """The key that is sent, empty: there is none, and where it was found."""

    text: str
    place: str


def examined(arguments: ConfigArguments, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is found of everything that `read_config` reads for these arguments, and of the services it leads to.

    Where the configuration is wrong, nothing is found of what it would have led to.
    """
    try:
        profiles = read_profiles(environ)
        yield _configuration(profiles)
        found = sources(arguments, environ)
        config = found.config("")
    except NotFound as error:
        yield Finding(what="profile", level="problem", text=error.message)
        return
    except LuthierError as error:
        yield Finding(what="configuration", level="problem", text=error.message)
        return
    yield _profile(found)
    finding, key = _key(found)
    yield finding
    answers = []
    for name in _ASKED:
        answer = _service(name, config, key)
        yield answer.finding
        answers.append((name, answer))
    yield _versions({name: answer.version for name, answer in answers if answer.version})
    yield _clock([answer for _, answer in answers])


def _configuration(profiles: Profiles) -> Finding:
    names = ", ".join(sorted(profiles.by_name))
    if profiles.path.exists():
        text = f"{profiles.path} has {f'the profiles {names}' if names else 'no profile'}"
    else:
        text = f"there is no {profiles.path}, and none is needed"
    return Finding(what="configuration", level="ok", text=text)


def _profile(found: Sources) -> Finding:
    who = f"{found.profile_name}, named by {found.profile_by}" if found.profile_name else "none is taken"
    return Finding(what="profile", level="ok", text=f"{who}; the project is {found.config('').project}")


def _key(found: Sources) -> tuple[Finding, _Key]:
    place = found.key_place()
    where = str(place)
    try:
        text = found.config(found.key()).api_key
    except (LuthierError, OSError, ValueError) as error:
        why = error.message if isinstance(error, LuthierError) else f"{where} cannot be read: {error}"
        return Finding(what="key", level="problem", text=why), _Key(text="", place=where)
    key = _Key(text=text, place=where)
    if isinstance(place, Path) and place.stat().st_mode & 0o077:
        told = f"found in {where}, which others on this machine may read: chmod 600 {where}"
        return Finding(what="key", level="warning", text=told), key
    return Finding(what="key", level="ok", text=f"found in {where}"), key


def _service(name: str, config: ClientConfig, key: _Key) -> _Answer:
    address: str = getattr(config, f"{name}_address")
    method, request = _ASKED[name]
    metadata = [(_ABOUT_KEY, "1")]
    if key.text:
        metadata.append(("authorization", f"Bearer {key.text}"))
    seconds = min(_ANSWER_SECONDS, config.timeout_seconds)
    try:
        wire = open_channel(address)
    except LuthierError as error:
        return _Answer(finding=Finding(what=f"{name} service", level="problem", text=error.message))
    asked = request(parent=f"projects/{config.project}", page_size=1)
    with wire:
        call: Any
        level: Level
        sent = time.time()
        try:
            _, call = method(wire).with_call(asked, timeout=seconds, metadata=metadata)
            received = time.time()
            level, text = "ok", f"{address} answers, and takes the key"
        except grpc.RpcError as error:
            call, received = error, time.time()
            level, text = _refusal(name, address, error, key)
    told = dict(call.trailing_metadata() or ())
    return _Answer(
        finding=Finding(what=f"{name} service", level=level, text=text),
        version=str(told.get(_VERSION_KEY, "")),
        ahead_seconds=_ahead(told.get(_TIME_KEY), (sent + received) / 2),
        unsure_seconds=(received - sent) / 2,
    )


def _refusal(name: str, address: str, failed: grpc.RpcError, key: _Key) -> tuple[Level, str]:
    """Return how bad it is that a service did not do as it was asked, and what would be right."""
    error = from_rpc_error(failed)
    setting = f"--{name}-address, LUTHIER_{name.upper()}_ADDRESS or the profile"
    if not has_request_id(failed):
        if error.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            return (
                "problem",
                f"nobody answers at {address} ({error.message}): is it running? {setting} says where",
            )
        return "problem", f"something else answers at {address} ({error.code}): {setting} says where it is"
    if isinstance(error, Unauthenticated):
        if not key.text:
            return "warning", f"{address} answers; without a key it says no more"
        return "problem", f"{address} answers, and does not take the key of {key.place}: {error.message}"
    if isinstance(error, PermissionDenied):
        return "warning", f"{address} answers and knows the key, which may not read here: {error.message}"
    level: Level = "problem" if isinstance(error, NotFound) else "warning"
    return level, f"{address} answers: {error.message}"


def _ahead(told: str | bytes | None, now: float) -> float | None:
    try:
        return float(told) - now if told else None
    except ValueError:
        return None


def _versions(services: Mapping[str, str]) -> Finding:
    own = version("luthier-client")
    text = f"luthier-client {own}, python {platform.python_version()}, grpcio {grpc.__version__}"
    if not services:
        return Finding(what="versions", level="ok", text=f"{text}; no service told its own")
    told = ", ".join(f"{name} {one}" for name, one in services.items())
    if set(services.values()) == {own}:
        return Finding(what="versions", level="ok", text=f"{text}; services: {told}")
    right = "those of one version understand each other wholly: pip install luthier-client==VERSION"
    return Finding(what="versions", level="warning", text=f"{text}; services: {told}; {right}")


def _clock(answers: list[_Answer]) -> Finding:
    apart = [
        (abs(answer.ahead_seconds) - answer.unsure_seconds, answer.ahead_seconds)
        for answer in answers
        if answer.ahead_seconds is not None
    ]
    if not apart:
        return Finding(what="clock", level="warning", text="no service told what time it is there")
    least, ahead = max(apart)
    if least <= _APART_SECONDS:
        return Finding(what="clock", level="ok", text=f"as the services' within {_APART_SECONDS:g} s")
    way = "behind" if ahead > 0 else "ahead of"
    return Finding(
        what="clock",
        level="warning",
        text=f"{abs(ahead):.1f} s {way} the services': times will look wrong, and certificates may; have chrony "
        "or ntpd keep both right",
    )
