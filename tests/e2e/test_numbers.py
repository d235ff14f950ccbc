"""Every number of every public request is held to a range, or stands here with the reason why it needs none.

A range is a method's: what is limited under one method and free under another is found. What is no number, and no
time, comes into no method of any service, those of workers and of other services among them.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tests.e2e.conftest import SERVICES, path_of
from tests.e2e.naming import EXTREMES, Place, empty, numbers, seconds_of_times
from tests.e2e.test_fuzz import GOLDEN, METHODS, Sites, check_whole, meant, seeded, served
from tests.golden.home_files import unpack_home

from luthier.runtime.door import admit
from luthier.runtime.named_resources import form_of
from luthier.work.peers import error_of

End = Literal["least", "most"]
ENDS: tuple[End, End] = ("least", "most")
NUMBERS = [(service, place) for service, method in METHODS for place in numbers(method)]
RANGED = [
    (service, place)
    for service, place in NUMBERS
    if place.method.containing_service.full_name != "luthier.worker.v1.WorkerService"
]
"""All but those of workers, which measure: of whole numbers these are held to be none below 0 (`work.validity`)."""
FLOATS = [
    (service, place)
    for service, place in NUMBERS
    if place.value.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
]
NO_NUMBERS = (math.nan, math.inf, -math.inf)
TIMES = [(service, place) for service, method in METHODS for place in seconds_of_times(method)]
NO_TIMES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "google.protobuf.Timestamp": (
        *((-62_135_596_801, 0), (253_402_300_800, 0), (-(2**63), 0), (2**63 - 1, 0)),
        *((0, -1), (0, 10**9), (0, -(2**31)), (0, 2**31 - 1)),
    ),
    "google.protobuf.Duration": (
        *((-315_576_000_001, 0), (315_576_000_001, 0), (-(2**63), 0), (2**63 - 1, 0)),
        *((1, -1), (-1, 1), (0, -(10**9)), (0, 10**9), (0, -(2**31)), (0, 2**31 - 1)),
    ),
}
"""Seconds and nanos that no calendar has: the year 10000, and before the first, and all that is more than a second."""
SEED = "every number is the seed of something"
ITS_UNIT = "it is in the unit of a score, of which nobody knows how large it gets"
FREE: Mapping[tuple[str, End], str] = {
    ("page_size", "most"): "more than a page holds means a whole page",
    ("luthier.v1.SplitSettings.seed", "least"): SEED,
    ("luthier.v1.SplitSettings.seed", "most"): SEED,
    ("luthier.v1.Hyperparameters.seed", "least"): SEED,
    ("luthier.v1.Hyperparameters.seed", "most"): SEED,
    ("luthier.v1.Evaluation.seed", "least"): SEED,
    ("luthier.v1.Evaluation.seed", "most"): SEED,
    ("luthier.v1.GenerateTextRequest.seed", "least"): SEED,
    ("luthier.v1.GenerateTextRequest.seed", "most"): SEED,
    ("luthier.v1.WriteUploadRequest.crc32", "most"): "bytes can have any",
    ("luthier.v1.Evaluation.max_records", "most"): "more than there are means all",
    ("luthier.v1.Evaluation.smallest_difference", "most"): ITS_UNIT,
    ("luthier.v1.ScoreGuard.max_loss", "most"): ITS_UNIT,
    ("luthier.v1.ScoreGate.least", "least"): ITS_UNIT,
    ("luthier.v1.ScoreGate.least", "most"): ITS_UNIT,
    ("luthier.v1.ScoreGate.most", "least"): ITS_UNIT,
    ("luthier.v1.ScoreGate.most", "most"): ITS_UNIT,
}
"""What may be said however large or small it is, under each method that takes it, and why. All other numbers are
refused at both ends of their type."""
BESIDE: Mapping[str, Mapping[str, str | bytes | float]] = {
    "luthier.v1.WriteUploadRequest": {"data": b"\xff\xff\xff\xff", "crc32": 2**32 - 1},
    "luthier.v1.MultiGrader": {"calculate_output": "a"},
    "luthier.v1.RenderingShare": {"rendering": "projects/default/renderings/chat"},
    "luthier.v1.ScoreGuard": {"score": "exact_match"},
    "luthier.v1.ScoreGate": {"score": "exact_match"},
}
"""What must be said in a message before anybody looks at its numbers; of bytes, some of the largest CRC-32, and it."""
TAKEN = "taken"


class Bases:
    """Requests that mean something, to which a number can be added."""

    def __init__(self, requests: list[Message], names: list[str]) -> None:
        self._requests = requests
        self._names = names
        for request in requests:
            if request.DESCRIPTOR.name == "CreateModelAliasRequest":  # each makes another
                request.ClearField("model_alias_id")

    def of(self, place: Place) -> Iterator[Message]:
        """Yield those for a place that were asked once, else such as are about anything there is."""
        kind = place.method.input_type
        known = [one for one in self._requests if one.DESCRIPTOR.full_name == kind.full_name]
        yield from known
        if not known:
            subject = kind.fields_by_name.get("parent") or kind.fields_by_name["name"]
            form = form_of(empty(place.method), subject.name) or "projects/{project}"
            pattern = re.sub(r"\{.*?\}", "[^/]+", form)
            for name in filter(re.compile(pattern).fullmatch, self._names):
                request = empty(place.method)
                Place(place.method, (subject,)).put(request, name)
                yield request


def key_of(place: Place, end: End) -> tuple[str, End]:
    field = place.path[-1]
    return ("page_size" if field.name == "page_size" else field.full_name), end


def with_number(base: Message, place: Place, number: float) -> Message:
    request = empty(place.method)
    request.CopyFrom(base)
    for depth, field in enumerate(place.path):
        holder: Any = field.containing_type
        for name, value in BESIDE.get(holder.full_name, {}).items():
            beside = (*place.path[:depth], holder.fields_by_name[name])
            Place(place.method, beside).put(request, value)
    place.put(request, number)
    return request


async def answer(sites: Sites, service: str, place: Place, request: Message) -> str:
    """Return why a request is refused for what it holds; `TAKEN` when it is not, empty when for something else."""
    channel: Any = sites.of[service].channel
    # On the wire one message is a stream of one.
    call = channel.unary_stream(path_of(place.method))(
        request.SerializeToString(), metadata=sites.credential_for(place.method), timeout=20
    )
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        refusing = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
        # Nobody is there who could generate: whoever is told so has said nothing wrong.
        is_taken = error.code() is grpc.StatusCode.UNAVAILABLE and place.method.name == "GenerateText"
        return error_of(error).message if refusing else TAKEN if is_taken else ""
    finally:
        call.cancel()
    return TAKEN


def is_named(place: Place, number: float, said: str) -> bool:
    """Tell whether a refusal says that the number is wrong."""
    field = re.escape(place.shown.removesuffix("['a']"))
    return any(
        re.fullmatch(rf"{field}:? .*got {re.escape(str(number))}( .*)?", part) for part in said.split("; ")
    )


async def asked(sites: Sites, bases: Bases, service: str, place: Place, number: float) -> str | None:
    """Say a number beside one base after another; return None once it is refused, `TAKEN` once it is not."""
    said = "nothing to ask with"
    for base in bases.of(place):
        said = await answer(sites, service, place, with_number(base, place, number))
        if is_named(place, number, said):
            return None
        if said == TAKEN:
            return TAKEN
    return f"never looked at: {said}"


async def test_every_number_of_every_public_request_has_its_range_under_each_method(tmp_path: Path) -> None:
    await asyncio.to_thread(unpack_home, GOLDEN, tmp_path)
    names, requests = meant(tmp_path)
    wrong, free = [], set()
    async with served(tmp_path) as sites:
        bases = Bases(requests, [*await seeded(sites), *names])
        for (service, place), end in itertools.product(RANGED, ENDS):
            if not (number := EXTREMES[place.value.cpp_type][ENDS.index(end)]):
                continue
            key = key_of(place, end)
            told = await asked(sites, bases, service, place, number)
            if told != (TAKEN if key in FREE else None):
                wrong.append(f"{service} {place} {number}: {told or 'refused'}")
            free |= {key} & FREE.keys()
    assert wrong == []
    assert free == FREE.keys(), "what no request has stands among what is free"


def request_of(place: Place, said: Mapping[Place, float]) -> Message:
    """Return a request that says numbers, and nothing else."""
    request = empty(place.method)
    for where, number in said.items():
        where.put(request, number)
    return request


async def test_what_is_no_number_comes_into_no_method(tmp_path: Path) -> None:
    wrong = []
    async with served(tmp_path) as sites:
        for (service, place), number in itertools.product(FLOATS, NO_NUMBERS):
            told = await answer(sites, service, place, request_of(place, {place: number}))
            if told != f"{place.shown}: must be a finite number, got {number}":
                wrong.append(f"{service} {place} {number}: {told}")
        await check_whole(sites, "afterwards")
    assert wrong == []


def bad_times(
    *, are_the_services: bool
) -> Iterator[tuple[str, Place, tuple[int, int], Mapping[Place, float]]]:
    """Yield where a time stands that no calendar has, it, and what has to be said for it."""
    for service, seconds in TIMES:
        if seconds.is_the_services == are_the_services:
            kind: Any = seconds.path[-1].containing_type
            within = seconds.path[:-1]
            nanos = Place(seconds.method, (*within, kind.fields_by_name["nanos"]))
            for said in NO_TIMES[kind.full_name]:
                yield service, Place(seconds.method, within), said, {seconds: said[0], nanos: said[1]}


async def test_what_no_calendar_has_comes_into_no_method(tmp_path: Path) -> None:
    wrong = []
    async with served(tmp_path) as sites:
        for service, place, time, said in bad_times(are_the_services=False):
            told = await answer(sites, service, place, request_of(place, said))
            if not re.fullmatch(
                rf"{re.escape(place.shown)}: must have .*, got seconds {time[0]}, nanos {time[1]}", told
            ):
                wrong.append(f"{service} {place} {time}: {told}")
        await check_whole(sites, "afterwards")
    assert wrong == []


def test_times_that_are_the_services_to_write_are_cleared_whatever_they_are() -> None:
    for _, place, time, said in bad_times(are_the_services=True):
        request = request_of(place, said)
        admit(request)
        assert not re.search("seconds|nanos", str(request)), f"{place} {time}"


def test_the_walk_finds_what_is_there() -> None:
    assert {(service, str(place).removeprefix("luthier.worker.v1.")) for service, place in FLOATS} >= {
        *((service, "WorkerService.ClaimTask wait_seconds") for service in SERVICES),
        *((service, "HoldService.CreateHold seconds") for service in SERVICES),
        ("training", "WorkerService.CommitCheckpoint metrics"),
        ("training", "WorkerService.ReportEvents events.event.metrics.values"),
        ("evaluation", "WorkerService.PushGeneration values.part_scores"),
        (
            "training",
            "luthier.v1.TrainingService.PlanFineTuningJob fine_tuning_job.hyperparameters.learning_rate",
        ),
    }
    said = {str(place) for _, place, *_ in bad_times(are_the_services=False)}
    assert said == {"luthier.worker.v1.WorkerService.ReportEvents events.event.event_time"}
