"""Compare today's answers with recorded ones, field by field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.golden.answers import Answer, Asker

_LONGEST_SHOWN = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """A difference that is meant: where, as a pattern of the whole place that `differences` names, and why."""

    place: str
    reason: str


def replay(asker: Asker, recorded: Sequence[Answer]) -> Iterator[str]:
    """Ask each recorded question again, in order; yield each difference as `<rpc> <path>: <then> -> <now>`."""
    for then in recorded:
        now = asker.ask(then["rpc"], then["request"], then.get("numEvents"))
        service, _, name = then["rpc"].rpartition(".")[2].partition("/")
        for path, old, new in differences(then, now):
            asked = then["request"].get("name") or then["request"].get("parent", "")
            yield f"{service}/{name} {path} of {asked}: {_shown(old)} -> {_shown(new)}"


def differences(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, old value and new value of whatever `then` holds and `now` does not; what `now` has beside is new."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key, value in then.items():
            yield from differences(value, now.get(key, "<is not there>"), f"{path}.{key}")
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (old, new) in enumerate(zip(then, now, strict=True)):
            yield from differences(old, new, f"{path}[{number}]")
    elif type(then) is not type(now) or then != now:
        yield path, then, now


def unmeant(found: Sequence[str], allowed: Sequence[Allowed]) -> list[str]:
    """Return the differences that nothing allows."""
    return [one for one in found if not any(re.match(meant.place, one) for meant in allowed)]


def unused(found: Sequence[str], allowed: Sequence[Allowed]) -> list[str]:
    """Return the places of allowed differences that are none any more."""
    return [meant.place for meant in allowed if not any(re.match(meant.place, one) for one in found)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
