"""How the events of resources are made: messages, stored and sent as they are."""

from __future__ import annotations

from typing import Literal

from google.rpc import status_pb2

from luthier.v1.event_pb2 import AttemptChange, Event, LogLine, StateChange

Severity = Literal["INFO", "WARNING", "ERROR"]
AttemptKind = Literal["STARTED", "SUCCEEDED", "FAILED", "LOST", "CANCELLED", "PAUSED"]


def state_changed(
    state: str, message: str = "", error: status_pb2.Status | None = None, *, attempt: int = 0
) -> Event:
    """Return that the resource entered `state`, a name without its prefix, and why."""
    return Event(attempt=attempt, state_change=StateChange(state=state, message=message, error=error))


def line(text: str, severity: Severity = "INFO", *, step: int = 0, attempt: int = 0) -> Event:
    """Return a line for people."""
    number = LogLine.Severity.Value(f"SEVERITY_{severity}")
    return Event(step=step, attempt=attempt, log=LogLine(severity=number, text=text))


def attempt_changed(
    kind: AttemptKind, worker: str, message: str = "", reason: str = "", *, attempt: int, share: int = 0
) -> Event:
    """Return that an attempt began or ended, and why: for people and for programs."""
    number = AttemptChange.Kind.Value(f"KIND_{kind}")
    change = AttemptChange(kind=number, worker=worker, message=message, reason=reason)
    return Event(attempt=attempt, share=share, attempt_change=change)


def reported(told: Event, attempt: int, share: int = 0) -> Event | None:
    """Return what a worker reported as it is recorded; None for kinds that only the service writes.

    A line without a severity is one of the normal course of work.
    """
    event = Event(step=told.step, attempt=attempt, share=share)
    match told.WhichOneof("payload"):
        case "progress":
            event.progress.CopyFrom(told.progress)
        case "metrics":
            event.metrics.CopyFrom(told.metrics)
        case "log":
            event.log.CopyFrom(told.log)
            event.log.severity = told.log.severity or LogLine.SEVERITY_INFO
        case _:
            return None
    return event
