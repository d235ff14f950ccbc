"""Every number of every public request is held to a range, or stands here with the reason why it needs none."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import grpc
from google.protobuf.message import Message
from tests.e2e.conftest import path_of
from tests.e2e.naming import EXTREMES, Place, empty, numbers
from tests.e2e.test_fuzz import GOLDEN, METHODS, Sites, meant, seeded, served
from tests.golden.home_files import unpack_home

from luthier.runtime.named_resources import form_of
from luthier.work.peers import error_of

End = Literal["least", "most"]
ENDS: tuple[End, End] = ("least", "most")
NUMBERS = [
    (service, place)
    for service, method in METHODS
    if method.full_name.startswith("luthier.v1.")
    for place in numbers(method)
]
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
"""What may be said however large or small it is, and why. All other numbers are refused at both ends of their type."""
BESIDE: Mapping[str, Mapping[str, str]] = {
    "luthier.v1.MultiGrader": {"calculate_output": "a"},
    "luthier.v1.RenderingShare": {"rendering": "projects/default/renderings/chat"},
    "luthier.v1.ScoreGuard": {"score": "exact_match"},
    "luthier.v1.ScoreGate": {"score": "exact_match"},
}
"""What must be said in a message before anybody looks at its numbers."""


class Bases:
    """Requests that mean something, to which a number can be added."""

    def __init__(self, requests: list[Message], names: list[str]) -> None:
        self._requests = requests
        self._names = names

    def of(self, place: Place, most: int) -> Iterator[Message]:
        """Yield at most so many for a place: those that were asked once, else such as are about anything there is."""
        kind = place.method.input_type
        known = [one for one in self._requests if one.DESCRIPTOR.full_name == kind.full_name]
        yield from known[:most]
        if not known:
            subject = kind.fields_by_name.get("parent") or kind.fields_by_name["name"]
            form = form_of(empty(place.method), subject.name) or "projects/{project}"
            pattern = re.sub(r"\{.*?\}", "[^/]+", form)
            for name in [name for name in self._names if re.fullmatch(pattern, name)][:most]:
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
        for name, text in BESIDE.get(holder.full_name, {}).items():
            beside = (*place.path[:depth], holder.fields_by_name[name])
            Place(place.method, beside).put(request, text)
    place.put(request, number)
    return request


async def answer(sites: Sites, service: str, place: Place, request: Message) -> str:
    """Return why a request is refused for what it holds; empty when it is not, or for something else."""
    channel: Any = sites.of[service].channel
    metadata = sites.credential_for(place.method)
    if place.method.client_streaming:
        call = channel.stream_unary(path_of(place.method))(
            iter([request.SerializeToString()]), metadata=metadata, timeout=20
        )
        reading = call
    else:
        call = channel.unary_stream(path_of(place.method))(
            request.SerializeToString(), metadata=metadata, timeout=20
        )
        reading = call.read()
    try:
        await reading
    except grpc.aio.AioRpcError as error:
        refusing = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)
        return error_of(error).message if refusing else ""
    finally:
        call.cancel()
    return ""


def is_named(place: Place, number: float, said: str) -> bool:
    """Tell whether a refusal says that the number is wrong."""
    field = re.escape(place.shown.removesuffix("['a']"))
    return any(
        re.fullmatch(rf"{field}:? .*got {re.escape(str(number))}( .*)?", part) for part in said.split("; ")
    )


async def asked(sites: Sites, bases: Bases, service: str, place: Place, end: End) -> str | None:
    """Say an extreme number somewhere; return what is told where it is not refused for that, else None."""
    number = EXTREMES[place.value.cpp_type][ENDS.index(end)]
    said = ""
    for base in bases.of(place, most=1 if key_of(place, end) in FREE else 1000) if number else ():
        said = await answer(sites, service, place, with_number(base, place, number))
        if is_named(place, number, said):
            return None
    return f"{place} {number}: {said or 'taken'}" if number else None


async def test_every_number_of_every_public_request_has_its_range(tmp_path: Path) -> None:
    await asyncio.to_thread(unpack_home, GOLDEN, tmp_path)
    names, requests = meant(tmp_path)
    taken: dict[tuple[str, End], str] = {}
    async with served(tmp_path) as sites:
        bases = Bases(requests, [*await seeded(sites), *names])
        for (service, place), end in itertools.product(NUMBERS, ENDS):
            if (told := await asked(sites, bases, service, place, end)) is not None:
                taken[key_of(place, end)] = told
    assert [told for key, told in taken.items() if key not in FREE] == []
    assert taken.keys() == FREE.keys(), "what is refused does not stand among what is not"
