"""Events: the numbered, append-only story of a resource, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from luthier.errors.failure import Failure

Severity = Literal["INFO", "WARNING", "ERROR"]
AttemptKind = Literal["STARTED", "SUCCEEDED", "FAILED", "LOST", "CANCELLED"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The resource entered `state`. After a `final` one no event follows."""

    state: str
    message: str = ""
    failure: Failure | None = None
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """`completed` of `total` units are done (total 0: not known); remaining_seconds 0: not known."""

    phase: str
    completed: int
    total: int
    unit: str
    remaining_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Values by metric name."""

    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted:
    """A checkpoint, by resource name, can be resumed from."""

    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A line for people."""

    severity: Severity
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptChanged:
    """An attempt began or ended."""

    kind: AttemptKind
    worker: str
    message: str = ""


Payload = StateChanged | Progressed | Measured | CheckpointCommitted | Logged | AttemptChanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An event before it is numbered.

    Attributes:
        payload: what happened.
        step: optimiser step it speaks of, 0 where steps do not apply.
        attempt: attempt that reported it, 0 where none was running.
    """

    payload: Payload
    step: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A recorded event; `sequence` counts from 1 within its subject, without gaps."""

    sequence: int
    event_time: datetime
    entry: Entry
