"""`luthier jobs logs`: what workers said, line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from luthier.v1.event_pb2 import Event

_SEVERITIES = ("info", "warning", "error")


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.option("-F", "--follow", is_flag=True, help="Go on until the job is done.")
@click.option(
    "--severity",
    type=click.Choice(_SEVERITIES),
    default="info",
    show_default=True,
    help="Only lines of this severity, or worse.",
)
@click.option("--attempt", type=click.IntRange(min=1), help="Only those of one attempt. [default: of all]")
@pass_session
def logs(session: Session, name: str, follow: bool, severity: str, attempt: int | None) -> None:
    """Show what the workers of a job said, and when attempts began and ended; also later, while that is kept."""
    jobs = session.client.jobs
    least = _SEVERITIES.index(severity) + 1
    has_some = False
    with jobs.watch(name) if follow else jobs.events(name, page_size=1000) as events:
        for event in _said(_told_of_gone(session, name, events), least, attempt):
            has_some = True
            if session.for_programs:
                session.show_line(event)
            else:
                session.write(f"{_line(event)}\n")
    if not has_some and not session.for_programs:
        session.note(f"nothing was said of {short(name)}")


def _told_of_gone(session: Session, name: str, events: Iterable[Event]) -> Iterator[Event]:
    """Yield events, and say first where those before them are gone."""
    for number, event in enumerate(events):
        if number == 0 and event.sequence > 1 and not session.for_programs:
            session.note(f"what was said of {short(name)} before event {event.sequence} is no longer kept")
        yield event


def _said(events: Iterable[Event], least: int, attempt: int | None) -> Iterator[Event]:
    """Yield the events that say something in words, of a severity or worse."""
    for event in events:
        if attempt is not None and event.attempt != attempt:
            continue
        if event.HasField("log"):
            if (event.log.severity or 1) >= least:
                yield event
        elif event.HasField("attempt_change") and least <= _severity_of(event):
            yield event


def _severity_of(event: Event) -> int:
    """Return as what an attempt's beginning or end counts: one that was lost or failed is worth a warning."""
    from luthier.v1.event_pb2 import AttemptChange

    return 2 if event.attempt_change.kind in (AttemptChange.KIND_LOST, AttemptChange.KIND_FAILED) else 1


def _line(event: Event) -> str:
    from luthier.client.cli.views import when
    from luthier.v1.event_pb2 import AttemptChange, LogLine

    if event.HasField("log"):
        severity = LogLine.Severity.Name(event.log.severity or LogLine.SEVERITY_INFO).removeprefix(
            "SEVERITY_"
        )
        text = event.log.text
    else:
        change = event.attempt_change
        severity = _SEVERITIES[_severity_of(event) - 1].upper()
        kind = AttemptChange.Kind.Name(change.kind).removeprefix("KIND_").lower()
        why = f": {change.message}" if change.message else ""
        text = f"attempt {event.attempt} {kind} on {change.worker}{why}"
    place = f"attempt {event.attempt}" if event.attempt else ""
    step = f" step {event.step}" if event.step else ""
    return f"{when(event.event_time)}  {severity:<7}  {place}{step}  {text}"
