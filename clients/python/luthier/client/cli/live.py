"""Progress of uploads, downloads and running resources.

Animated on a terminal, plain lines elsewhere, on stderr.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from luthier.client.cli.charts import MetricChart
from luthier.client.cli.session import Session
from luthier.client.cli.views import number, size
from luthier.client.names import short
from luthier.v1.event_pb2 import AttemptChange, Event, LogLine

if TYPE_CHECKING:
    from luthier.client.transfers import ProgressCallback, TransferProgress

_LINE_SECONDS = 5.0
_CHART_COLUMNS, _CHART_LINES = 100, 16
_SHOWN_METRICS = (("train_loss", "loss"), ("validation_loss", "val loss"), ("tokens_per_second", "tok/s"))


@contextmanager
def transfer(session: Session, verb: str) -> Iterator[ProgressCallback]:
    """Show the progress of files that are sent or fetched one after another."""
    if session.for_programs or not session.err.is_terminal:
        yield _transfer_lines(session, verb)
        return
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=session.err) as bars:
        tasks: dict[str, TaskID] = {}

        def update(progress: TransferProgress) -> None:
            if progress.name not in tasks:
                description = f"{verb} {short(progress.name)}"
                tasks[progress.name] = bars.add_task(description, total=progress.total_bytes)
            bars.update(tasks[progress.name], completed=progress.completed_bytes)

        yield update


def _transfer_lines(session: Session, verb: str) -> ProgressCallback:
    done: set[str] = set()

    def update(progress: TransferProgress) -> None:
        if progress.completed_bytes == progress.total_bytes and progress.name not in done:
            done.add(progress.name)
            if not session.for_programs:
                session.note(f"{verb} {short(progress.name)}: {size(progress.total_bytes)}")

    return update


@contextmanager
def events(session: Session, name: str, chart: bool = False) -> Iterator[Callable[[Event], None]]:
    """Show a resource's events: one for programs each, an animated line on a terminal, or plain lines.

    With `chart` a terminal shows the curve of the loss, or of the reward, above the line as it grows.
    """
    if session.for_programs:
        yield session.show_line
    elif session.err.is_terminal:
        with _EventBar(session, name, MetricChart() if chart else None) as bar:
            yield bar.update
    else:
        yield _EventLines(session, name).update


class EventSummary:
    """What the events so far say about now."""

    def __init__(self) -> None:
        self.state = ""
        self.completed = 0
        self.total = 0
        self.phase = ""
        self.unit = ""
        self.remaining_seconds = 0.0
        self.metrics: dict[str, float] = {}

    def take(self, event: Event) -> str:
        """Take an event in. Returns a line worth reading on its own, or nothing."""
        kind = event.WhichOneof("payload")
        if kind == "progress":
            progress = event.progress
            self.phase, self.unit = progress.phase, progress.unit
            self.completed, self.total = progress.completed, progress.total
            self.remaining_seconds = progress.remaining_seconds
        elif kind == "metrics":
            self.metrics.update(event.metrics.values)
        elif kind == "state_change":
            self.state = event.state_change.state
            return ": ".join(part for part in (self.state, event.state_change.message) if part)
        elif kind == "checkpoint":
            return f"checkpoint {short(event.checkpoint.checkpoint)}"
        elif kind == "attempt_change" and event.attempt_change.kind == AttemptChange.KIND_LOST:
            of_share = f" of share {event.share}" if event.share else ""
            return f"attempt {event.attempt}{of_share} was lost: {event.attempt_change.message}"
        elif kind == "log" and event.log.severity >= LogLine.SEVERITY_WARNING:
            severity = LogLine.Severity.Name(event.log.severity).removeprefix("SEVERITY_").lower()
            return f"{severity}: {event.log.text}"
        return ""

    def position(self) -> str:
        """Return how far it is, e.g. `training 12/41 steps`; the phase alone before anything is counted."""
        if not self.completed and not self.total:
            return self.phase
        count = f"{number(self.completed)}/{number(self.total)}" if self.total else number(self.completed)
        return f"{self.phase} {count} {self.unit}".strip()

    def values(self) -> list[str]:
        """Return the values worth watching, each with its name."""
        shown = [f"{word} {self.metrics[key]:.4g}" for key, word in _SHOWN_METRICS if key in self.metrics]
        if self.remaining_seconds > 0 and self.completed < self.total:
            shown.append(f"ETA {duration(self.remaining_seconds)}")
        return shown


def duration(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _ValuesColumn(ProgressColumn):
    max_refresh = 0.2

    def render(self, task: Task) -> Text:
        """Draw the values that the task carries."""
        return Text("  ".join(task.fields["values"]), style="cyan")


class _EventBar:
    """One animated line, below a chart where there is one; what is worth keeping scrolls above them."""

    def __init__(self, session: Session, name: str, chart: MetricChart | None = None) -> None:
        self._summary = EventSummary()
        self._chart = chart
        self._console = session.err
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[position]}", markup=False),
            _ValuesColumn(),
            TimeElapsedColumn(),
            console=session.err,
        )
        self._task = self._bars.add_task(short(name), total=None, position="", values=[])
        self._live = Live(get_renderable=self._drawn, console=session.err, refresh_per_second=5)

    def __enter__(self) -> _EventBar:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _drawn(self) -> Group:
        """Return what stands below what has scrolled: a chart of at most a third of the screen, and the line."""
        lines = [] if self._chart is None else self._chart.lines(*self._room())
        return Group(*lines, self._bars.get_renderable())

    def _room(self) -> tuple[int, int]:
        width, height = self._console.size
        return min(width, _CHART_COLUMNS), min(height // 3, _CHART_LINES)

    def update(self, event: Event) -> None:
        """Take an event in and redraw."""
        line = self._summary.take(event)
        if line:
            self._console.print(Text(line))
        if self._chart is not None and event.HasField("metrics"):
            self._chart.take(event.step, event.metrics.values)
        summary = self._summary
        self._bars.update(
            self._task,
            completed=summary.completed,
            total=summary.total or None,
            position=summary.position() or summary.state,
            values=summary.values(),
        )


class _EventLines:
    """A line for what is worth keeping, and one every few seconds for how far it is."""

    def __init__(self, session: Session, name: str) -> None:
        self._summary = EventSummary()
        self._session = session
        self._label = short(name)
        self._next_line = 0.0
        self._last_position = ""

    def update(self, event: Event) -> None:
        """Take an event in; write a line when it is time."""
        line = self._summary.take(event)
        if line:
            self._session.note(f"{self._label}: {line}")
            return
        position = self._summary.position()
        if event.WhichOneof("payload") != "progress" or position == self._last_position:
            return
        is_end = self._summary.completed == self._summary.total
        if is_end or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            self._last_position = position
            self._session.note("  ".join([f"{self._label}: {position}", *self._summary.values()]))
