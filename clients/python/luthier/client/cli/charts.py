"""Line charts of characters: dots of braille, two by four in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from rich.text import Text

MOST_POINTS = 512
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a character of braille, by row and column of the dot."""
_EMPTY = 0x2800
_LABEL_WIDTH = 9
_SERIES = (("train_loss", "loss", "cyan"), ("validation_loss", "validation loss", "yellow"))
"""Metrics that are drawn, how they are called, and their colours."""
_REWARDS = (("reward_mean", "reward", "cyan"), ("validation_reward", "validation reward", "yellow"))

Point = tuple[float, float]


class Curve:
    """Points by step, at most `MOST_POINTS` of them: with more, neighbours become their mean."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, int]] = []
        self._each = 1

    def add(self, step: float, value: float) -> None:
        """Add a point behind the others; a step that is made again takes its place, with all that came after it."""
        if not math.isfinite(value):
            return
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        last = self._points[-1] if self._points else None
        if last is not None and last[2] < self._each:
            count = last[2] + 1
            self._points[-1] = (step, last[1] + (value - last[1]) / count, count)
        else:
            self._points.append((step, value, 1))
        if len(self._points) > MOST_POINTS:
            self._points = [
                (after[0], (before[1] + after[1]) / 2, before[2] + after[2])
                for before, after in zip(self._points[::2], self._points[1::2], strict=False)
            ]
            self._each *= 2

    def points(self) -> list[Point]:
        """Return what is drawn, in order of steps."""
        return [(step, value) for step, value, _ in self._points]


class MetricChart:
    """The loss of a run by step, of training and of validation, or its reward where it learns from one."""

    def __init__(self) -> None:
        self._curves: dict[str, Curve] = {}

    def take(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was measured at a step."""
        for metric, _, _ in (*_SERIES, *_REWARDS):
            if metric in values:
                self._curves.setdefault(metric, Curve()).add(step, values[metric])

    def lines(self, width: int, height: int) -> list[Text]:
        """Return the chart in so many columns and lines, a legend and an axis among them; none before two steps."""
        is_rewarded = "reward_mean" in self._curves
        drawn = [
            (name, colour, self._curves[metric].points())
            for metric, name, colour in (_REWARDS if is_rewarded else _SERIES)
            if metric in self._curves
        ]
        everything = [point for _, _, points in drawn for point in points]
        if len({step for step, _ in everything}) < 2 or width < 24 or height < 5:
            return []
        return _chart(drawn, everything, width, height)


def _chart(
    drawn: Sequence[tuple[str, str, Sequence[Point]]], everything: Sequence[Point], width: int, height: int
) -> list[Text]:
    low, high = min(value for _, value in everything), max(value for _, value in everything)
    first, last = min(step for step, _ in everything), max(step for step, _ in everything)
    span = high - low or abs(high) or 1.0
    columns, rows = width - _LABEL_WIDTH - 2, height - 2
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for _, colour, points in drawn:
        scaled = [
            (
                round((step - first) / (last - first) * (columns * 2 - 1)),
                round((high - value) / span * (rows * 4 - 1)),
            )
            for step, value in points
        ]
        for x, y in _joined(scaled):
            place = (y // 4, x // 2)
            bits = cells.get(place, (0, ""))[0] | _DOTS[y % 4][x % 2]
            cells[place] = (bits, colour)
    legend = Text("  ".join(f"{name} {points[-1][1]:.4g}" for name, _, points in drawn))
    position = 0
    for name, colour, points in drawn:
        length = len(f"{name} {points[-1][1]:.4g}")
        legend.stylize(colour, position, position + length)
        position += length + 2
    lines = [legend]
    for row in range(rows):
        label = f"{high:.4g}" if row == 0 else f"{low:.4g}" if row == rows - 1 else ""
        line = Text(f"{label:>{_LABEL_WIDTH}} │")
        for column in range(columns):
            bits, colour = cells.get((row, column), (0, ""))
            line.append(chr(_EMPTY + bits) if bits else " ", style=colour)
        lines.append(line)
    ends = f"{first:,.0f}", f"{last:,.0f}"
    between = max(1, columns - len(ends[0]) - len(ends[1]))
    lines.append(Text(" " * (_LABEL_WIDTH + 2) + ends[0] + " " * between + ends[1], style="dim"))
    return lines


def _joined(points: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots of a line through points: at least one in each column between two of them."""
    if points:
        yield points[0]
    for (x0, y0), (x1, y1) in pairwise(points):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for place in range(1, length + 1):
            yield round(x0 + (x1 - x0) * place / length), round(y0 + (y1 - y0) * place / length)
