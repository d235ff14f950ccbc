"""Dashboards drawn from what a Prometheus answers to their queries, without Grafana: to be seen in documents."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.grafana.builder import Dashboard, Panel, Row

_CELL, _LINE = 46, 36
"""Width of one of 24 columns, and height of Grafana's unit, in pixels."""
_WIDTH = 24 * _CELL
_COLOURS = ("#3274d9", "#e0752d", "#5a9e3d", "#a352cc", "#c4162a", "#1f9ca8", "#b59a20", "#707070")
_MOST_LINES = 8
_MOST_NAME_LINES = 5
_NAME_HEIGHT = 14
_SCALES = {"bytes": ("B", 1024.0), "Bps": ("B/s", 1024.0)}
Point = tuple[float, float]
"""A time and a value, or a place."""
_Name = tuple[str, int, int]
"""What stands in a legend, in which of its lines, and how far from the left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of an answer: what it is called, and its values by time in seconds; what is no number is left out."""

    name: str
    points: Sequence[Point]

    @property
    def largest(self) -> float:
        """Its largest value, whatever its sign."""
        return max(abs(value) for _, value in self.points)


Answers = Mapping[str, Sequence[Line]]
"""Lines of panels by the panels' titles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The time that all panels show, in seconds, and that from one value of a series to the next."""

    first: float
    last: float
    step: float

    @property
    def span(self) -> float:
        """How long it is."""
        return (self.last - self.first) or 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Where something is drawn, in pixels."""

    x: int
    y: int
    width: int
    height: int


def draw(board: Dashboard, answers: Answers, times: Times, note: str) -> str:
    """Return a dashboard as SVG; `note` stands under its title."""
    height = _height(board)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(8, 22, board.title, size=16, weight="bold"),
        _text(8, 38, note, fill="#666666"),
        *_rows(board, answers, times),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _height(board: Dashboard) -> int:
    return 46 + sum(26 + sum(_line_heights(row)) for row in board.rows)


def _lines(row: Row) -> Iterator[list[Panel]]:
    """Yield the panels of a row by the lines that they take."""
    line: list[Panel] = []
    for panel in row.panels:
        if sum(one.width for one in line) + panel.width > 24:
            yield line
            line = []
        line.append(panel)
    yield line


def _line_heights(row: Row) -> list[int]:
    return [max(panel.height for panel in line) * _LINE for line in _lines(row)]


def _rows(board: Dashboard, answers: Answers, times: Times) -> Iterator[str]:
    y = 46
    for row in board.rows:
        yield _text(8, y + 17, row.title, size=13, weight="bold")
        y += 26
        for line, height in zip(_lines(row), _line_heights(row), strict=True):
            x = 0
            for panel in line:
                box = _Box(x=x, y=y, width=panel.width * _CELL, height=height)
                yield from _panel(panel, answers.get(panel.title, ()), times, box)
                x += box.width
            y += height


def _panel(panel: Panel, lines: Sequence[Line], times: Times, box: _Box) -> Iterator[str]:
    x, y, width, height = box.x, box.y, box.width, box.height
    yield f'<rect x="{x + 3}" y="{y + 3}" width="{width - 6}" height="{height - 6}" fill="none" stroke="#d8d8d8"/>'
    yield _text(x + 10, y + 18, panel.title, weight="bold")
    there = [line for line in lines if line.points]
    if not there:
        yield _text(x + 10, y + 36, "no data", fill="#999999")
    elif panel.kind == "stat":
        yield _text(x + 10, y + 60, shown(there[0].points[-1][1], panel.unit), size=26, fill=_COLOURS[0])
    elif panel.kind == "table":
        for number, line in enumerate(there[:_MOST_LINES]):
            yield _text(x + 10, y + 40 + 18 * number, f"{line.name}: {shown(line.points[-1][1], panel.unit)}")
    else:
        drawn, names = _chosen(there, width - 20)
        below = _NAME_HEIGHT * (1 + names[-1][1]) + 24
        plot = _Box(x=x + 58, y=y + 28, width=width - 70, height=height - 40 - below)
        yield from _plot(panel, drawn, times, plot)
        yield from _legend(names, len(drawn), x + 10, y + height - below + 18)


def _chosen(lines: Sequence[Line], width: int) -> tuple[list[Line], list[_Name]]:
    """Return the lines that are drawn, in their order, and their legend: the largest, as many as can be named."""
    largest = sorted(lines, key=lambda line: -line.largest)
    for count in range(min(len(lines), _MOST_LINES), 0, -1):
        drawn = [line for line in lines if any(line is one for one in largest[:count])]
        names = list(_placed([line.name for line in drawn], len(lines) - count, width))
        if names[-1][1] < _MOST_NAME_LINES:
            break
    return drawn, names


def _plot(panel: Panel, lines: Sequence[Line], times: Times, box: _Box) -> Iterator[str]:
    levels = _stacked(lines, times) if panel.stacked else [line.points for line in lines]
    values = [value for points in levels for _, value in points]
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0
    for share in (0.0, 0.5, 1.0):
        level = box.y + box.height - share * box.height
        yield f'<line x1="{box.x}" x2="{box.x + box.width}" y1="{level:.1f}" y2="{level:.1f}" stroke="#eeeeee"/>'
        yield _text(box.x - 4, level + 4, shown(low + share * span, panel.unit), anchor="end", fill="#666666")
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        moment = shown(share * times.span, "s")
        yield _text(box.x + share * box.width, box.y + box.height + 13, moment, anchor=anchor, fill="#666666")
    for points, colour in zip(levels, _COLOURS, strict=False):
        for piece in _unbroken(points, times.step):
            places = [
                (
                    box.x + (time - times.first) / times.span * box.width,
                    box.y + box.height - (value - low) / span * box.height,
                )
                for time, value in piece
            ]
            yield _drawn(places, colour)


def _drawn(places: Sequence[Point], colour: str) -> str:
    """Return a piece of a line; where it has one value only, a point."""
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="1.5" fill="{colour}"/>'
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.4"/>'


def _unbroken(points: Sequence[Point], step: float) -> Iterator[list[Point]]:
    """Yield a series piece by piece: where it has no values nothing is known, and no line is drawn."""
    piece: list[Point] = []
    for point in points:
        if piece and point[0] - piece[-1][0] > 1.5 * step:
            yield piece
            piece = []
        piece.append(point)
    yield piece


def _stacked(lines: Sequence[Line], times: Times) -> list[list[Point]]:
    """Return each line on top of those before it: what is not there adds nothing."""
    below: dict[int, float] = {}
    levels = []
    for line in lines:
        level = []
        for time, value in line.points:
            moment = round((time - times.first) / times.step)
            below[moment] = below.get(moment, 0.0) + value
            level.append((time, below[moment]))
        levels.append(level)
    return levels


def _placed(names: Sequence[str], num_others: int, width: int) -> Iterator[_Name]:
    left, line = 0, 0
    for name in [*names, *([f"and {num_others} more"] if num_others else [])]:
        short = name if len(name) <= 40 else f"{name[:39]}…"
        needed = 22 + 7 * len(short)
        if left and left + needed > width:
            left, line = 0, line + 1
        yield short, line, left
        left += needed


def _legend(names: Sequence[_Name], num_drawn: int, x: int, y: int) -> Iterator[str]:
    for number, (name, line, left) in enumerate(names):
        top = y + line * _NAME_HEIGHT
        if number < num_drawn:
            yield f'<rect x="{x + left}" y="{top - 8}" width="10" height="10" fill="{_COLOURS[number]}"/>'
        yield _text(x + left + 14, top + 1, name, fill="#444444")


def _text(x: float, y: float, text: str, **style: object) -> str:
    names = {"size": "font-size", "weight": "font-weight", "anchor": "text-anchor", "fill": "fill"}
    more = "".join(f' {names[name]}="{value}"' for name, value in style.items())
    return f'<text x="{x:.0f}" y="{y:.0f}"{more}>{html.escape(text)}</text>'


def shown(value: float, unit: str) -> str:
    """Return a value as people read it."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"
    word, step = _SCALES.get(unit, ("", 1000.0))
    if abs(value) < step:
        return f"{value:.3g} {word}".strip()
    power = min(4, int(math.log(abs(value), step)))
    scaled = value / step**power
    return (
        f"{scaled:.3g} {'kMGT'[power - 1]}{word}"
        if scaled < 999
        else f"{scaled:.0f} {'kMGT'[power - 1]}{word}"
    )
