"""Curves of characters, and that `jobs watch` draws them on a terminal."""

from __future__ import annotations

import io
import math

import pytest

from luthier.client.cli.charts import MOST_POINTS, Curve, MetricChart
from luthier.client.cli.console import EscapingConsole
from luthier.client.cli.live import events
from luthier.client.cli.session import Session
from luthier.v1.event_pb2 import Event, MetricValues
from luthier.v1.event_pb2 import Progress as ProgressEvent


def dots(line: str) -> list[int]:
    """Columns of a line that have a dot."""
    return [
        place for place, character in enumerate(line.partition("│")[2]) if 0x2800 < ord(character) < 0x2900
    ]


def test_a_falling_loss_falls() -> None:
    chart = MetricChart()
    for step in range(1, 101):
        chart.take(step, {"train_loss": 10 - step / 10})
    lines = [line.plain for line in chart.lines(60, 12)]
    assert lines[0] == "loss 0"
    assert lines[1].startswith("      9.9 │")
    assert lines[-2].startswith("        0 │")
    assert (lines[-1].split(), len(lines)) == (["1", "100"], 12)
    rows = [dots(line) for line in lines[1:-1]]
    assert all(rows), "a straight line has dots in every row"
    assert [min(row) for row in rows] == sorted(min(row) for row in rows), "it goes down from left to right"
    assert (min(rows[0]), max(rows[-1])) == (0, 60 - 11 - 1)
    assert all(len(line) <= 60 for line in lines)


def test_validation_has_a_colour_of_its_own() -> None:
    chart = MetricChart()
    for step in range(1, 11):
        chart.take(step, {"train_loss": 2.0})
    chart.take(10, {"validation_loss": 3.0})
    legend = chart.lines(60, 10)[0]
    assert legend.plain == "loss 2  validation loss 3"
    assert [str(span.style) for span in legend.spans] == ["cyan", "yellow"]


def test_a_reward_is_drawn_in_place_of_a_loss() -> None:
    chart = MetricChart()
    for step in range(1, 5):
        chart.take(step, {"train_loss": 0.1, "reward_mean": step / 4})
    assert chart.lines(60, 10)[0].plain == "reward 1"


@pytest.mark.parametrize(("width", "height"), [(10, 12), (60, 3)])
def test_where_there_is_no_room_nothing_is_drawn(width: int, height: int) -> None:
    chart = MetricChart()
    chart.take(1, {"train_loss": 2.0})
    assert chart.lines(60, 12) == [], "one step is no curve"
    chart.take(2, {"train_loss": 1.0})
    assert chart.lines(60, 12)
    assert chart.lines(width, height) == []


def test_what_is_no_number_is_left_out() -> None:
    chart = MetricChart()
    for step, value in enumerate((2.0, math.nan, math.inf, 1.0), start=1):
        chart.take(step, {"train_loss": value})
    assert chart.lines(60, 12)[0].plain == "loss 1"


def test_a_long_run_takes_no_more_room_and_keeps_its_shape() -> None:
    curve = Curve()
    for step in range(1, 20_001):
        curve.add(step, step / 20_000)
    points = curve.points()
    assert len(points) <= MOST_POINTS
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert all(abs(value - step / 20_000) < 0.01 for step, value in points)
    assert points[-1][0] == 20_000


def test_steps_that_are_made_again_take_the_place_of_what_was_there() -> None:
    """A lost attempt repeats what came after its last checkpoint."""
    curve = Curve()
    for step, value in ((1, 3.0), (2, 9.0), (3, 9.0), (2, 2.0)):
        curve.add(step, value)
    assert curve.points() == [(1, 3.0), (2, 2.0)]


def test_a_constant_is_a_line() -> None:
    chart = MetricChart()
    for step in (1, 2):
        chart.take(step, {"train_loss": 0.0})
    assert any(dots(line.plain) for line in chart.lines(60, 8))


class Terminal(Session):
    """A session whose stderr is a terminal that the test can read."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = io.StringIO()
        self._terminal = EscapingConsole(
            file=self.stream, force_terminal=True, width=80, height=40, _environ={"NO_COLOR": "1"}
        )

    @property
    def err(self) -> EscapingConsole:
        return self._terminal


@pytest.mark.parametrize("chart", [True, False])
def test_watching_draws_it_above_the_line(chart: bool) -> None:
    session = Terminal()
    with events(session, "projects/default/fineTuningJobs/one", chart) as show:
        for step in range(1, 6):
            show(Event(step=step, metrics=MetricValues(values={"train_loss": 3.0 - step / 2})))
            show(Event(progress=ProgressEvent(phase="training", completed=step, total=5, unit="steps")))
    shown = session.stream.getvalue()
    assert "training 5/5 steps" in shown
    assert ("│" in shown) == chart
    assert any(0x2800 < ord(character) < 0x2900 for character in shown) == chart
