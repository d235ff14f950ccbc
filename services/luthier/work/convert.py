"""Events between plain values, JSON rows and the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from luthier.errors import status
from luthier.errors.failure import Failure
from luthier.v1 import event_pb2
from luthier.work.events import (
    AttemptChanged,
    CheckpointCommitted,
    Entry,
    Event,
    Logged,
    Measured,
    Payload,
    Progressed,
    StateChanged,
)

failure_to_status = status.failure_to_status
status_to_failure = status.status_to_failure
_PAYLOADS: Mapping[str, type[Payload]] = {
    "state_change": StateChanged,
    "progress": Progressed,
    "metrics": Measured,
    "checkpoint": CheckpointCommitted,
    "log": Logged,
    "attempt_change": AttemptChanged,
}
_KINDS = {payload_type: kind for kind, payload_type in _PAYLOADS.items()}


def payload_to_row(payload: Payload) -> tuple[str, dict[str, Any]]:
    """Return the kind and the JSON form of a payload."""
    return _KINDS[type(payload)], asdict(payload)


def row_to_payload(kind: str, row: Mapping[str, Any]) -> Payload:
    """Read a payload from its kind and JSON form."""
    if kind == "state_change" and row["failure"] is not None:
        return StateChanged(**{**row, "failure": Failure(**row["failure"])})
    return _PAYLOADS[kind](**row)


def event_to_proto(event: Event) -> event_pb2.Event:
    """Write a recorded event for the wire."""
    message = entry_to_proto(event.entry)
    message.sequence = event.sequence
    message.attempt = event.entry.attempt
    message.event_time.FromDatetime(event.event_time.astimezone(UTC).replace(tzinfo=None))
    return message


def entry_to_proto(entry: Entry) -> event_pb2.Event:
    """Write an event that has no number yet."""
    message = event_pb2.Event(step=entry.step)
    match entry.payload:
        case StateChanged() as change:
            message.state_change.state = change.state
            message.state_change.message = change.message
            if change.failure is not None:
                message.state_change.error.CopyFrom(failure_to_status(change.failure))
        case Progressed() as progress:
            message.progress.CopyFrom(event_pb2.Progress(**asdict(progress)))
        case Measured() as measured:
            message.metrics.values.update(measured.values)
            message.metrics.SetInParent()
        case CheckpointCommitted() as committed:
            message.checkpoint.checkpoint = committed.checkpoint
        case Logged() as line:
            message.log.severity = event_pb2.LogLine.Severity.Value(f"SEVERITY_{line.severity}")
            message.log.text = line.text
        case AttemptChanged() as change:
            message.attempt_change.kind = event_pb2.AttemptChange.Kind.Value(f"KIND_{change.kind}")
            message.attempt_change.worker = change.worker
            message.attempt_change.message = change.message
    return message


def entry_from_proto(message: event_pb2.Event, attempt: int) -> Entry | None:
    """Read an event that a worker reported; None for kinds that only the service writes."""
    payload: Payload
    match message.WhichOneof("payload"):
        case "progress":
            wire = message.progress
            payload = Progressed(
                phase=wire.phase,
                completed=wire.completed,
                total=wire.total,
                unit=wire.unit,
                remaining_seconds=wire.remaining_seconds,
            )
        case "metrics":
            payload = Measured(values=dict(message.metrics.values))
        case "log":
            name = event_pb2.LogLine.Severity.Name(message.log.severity).removeprefix("SEVERITY_")
            severity = name if name in {"INFO", "WARNING", "ERROR"} else "INFO"
            payload = Logged(severity=severity, text=message.log.text)  # type: ignore[arg-type]
        case _:
            return None
    return Entry(payload=payload, step=message.step, attempt=attempt)


def time_from_us(microseconds: int) -> datetime:
    """Read a stored time, microseconds since 1970 in UTC."""
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC)
