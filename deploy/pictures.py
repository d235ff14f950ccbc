"""Dashboards drawn from what a Prometheus answers to their queries, without Grafana: to be seen in documents."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy.grafana.builder import Dashboard, Panel, Row

_CELL, _LINE = 46, 30
"""Width of one of 24 columns, and height of Grafana's unit, in pixels."""
_WIDTH = 24 * _CELL
_COLOURS = ("#3274d9", "#e0752d", "#5a9e3d", "#a352cc", "#c4162a", "#1f9ca8", "#b59a20", "#707070")
_MOST_LINES = 8
_SCALES = {"bytes": ("B", 1024.0), "Bps": ("B/s", 1024.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of an answer: what it is called, and its values by time in seconds; what is no number is left out."""

    name: str
    points: Sequence[tuple[float, float]]


Answers = Mapping[str, Sequence[Line]]
"""Lines of panels by the panels' titles."""


def draw(board: Dashboard, answers: Answers, note: str) -> str:
    """Return a dashboard as SVG; `note` stands under its title."""
    height = _height(board)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(8, 22, board.title, size=16, weight="bold"),
        _text(8, 38, note, fill="#666666"),
        *_rows(board, answers),
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


def _rows(board: Dashboard, answers: Answers) -> Iterator[str]:
    y = 46
    for row in board.rows:
        yield _text(8, y + 17, row.title, size=13, weight="bold")
        y += 26
        for line, height in zip(_lines(row), _line_heights(row), strict=True):
            x = 0
            for panel in line:
                yield from _panel(panel, answers.get(panel.title, ()), x, y, height)
                x += panel.width * _CELL
            y += height


def _panel(panel: Panel, lines: Sequence[Line], x: int, y: int, height: int) -> Iterator[str]:
    width = panel.width * _CELL
    yield f'<rect x="{x + 3}" y="{y + 3}" width="{width - 6}" height="{height - 6}" fill="none" stroke="#d8d8d8"/>'
    yield _text(x + 10, y + 18, panel.title, weight="bold")
    drawn = [line for line in lines if line.points][:_MOST_LINES]
    if not drawn:
        yield _text(x + 10, y + 36, "no data", fill="#999999")
    elif panel.kind == "stat":
        yield _text(x + 10, y + 60, shown(drawn[0].points[-1][1], panel.unit), size=26, fill=_COLOURS[0])
    elif panel.kind == "table":
        for number, line in enumerate(drawn):
            yield _text(x + 10, y + 40 + 18 * number, f"{line.name}: {shown(line.points[-1][1], panel.unit)}")
    else:
        yield from _plot(panel, drawn, (x + 58, y + 28, width - 70, height - 82))
        yield from _legend(drawn, x + 10, y + height - 36, width - 20)


def _plot(panel: Panel, lines: Sequence[Line], box: tuple[int, int, int, int]) -> Iterator[str]:
    x, y, width, height = box
    times = [time for line in lines for time, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    first, last = min(times), max(times)
    low, high = min(0.0, *values), max(values)
    span = (high - low) or 1.0
    for share in (0.0, 0.5, 1.0):
        level = y + height - share * height
        yield f'<line x1="{x}" x2="{x + width}" y1="{level:.1f}" y2="{level:.1f}" stroke="#eeeeee"/>'
        yield _text(x - 4, level + 4, shown(low + share * span, panel.unit), anchor="end", fill="#666666")
    for line, colour in zip(lines, _COLOURS, strict=False):
        across, up = width / ((last - first) or 1.0), height / span
        places = " ".join(
            f"{x + (time - first) * across:.1f},{y + height - (value - low) * up:.1f}"
            for time, value in line.points
        )
        yield f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.4"/>'


def _legend(lines: Sequence[Line], x: int, y: int, width: int) -> Iterator[str]:
    left, top = x, y
    for line, colour in zip(lines, _COLOURS, strict=False):
        name = line.name if len(line.name) <= 40 else f"{line.name[:39]}…"
        needed = 22 + 6 * len(name)
        if left + needed > x + width and left > x:
            left, top = x, top + 14
        if top > y + 14:
            return
        yield f'<rect x="{left}" y="{top - 8}" width="10" height="10" fill="{colour}"/>'
        yield _text(left + 14, top + 1, name, fill="#444444")
        left += needed


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
    return f"{value / step**power:.3g} {'kMGT'[power - 1]}{word}"
