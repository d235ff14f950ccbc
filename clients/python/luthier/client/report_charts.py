"""The pictures of the HTML report, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from luthier.client.escaping import escaped_html
from luthier.client.scores import estimate_words, is_share
from luthier.v1.evaluation_pb2 import ScoreEstimate
from luthier.v1.fine_tuning_job_pb2 import MetricPoint

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 30, 40
_SMOOTHED_FROM = 60


class _Scale:
    """Maps values in [low, high] to pixels in [start, end]."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span = low, (high - low) or 1.0
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self._low) / self._span * self._length, 2)


def loss_curve(points: Sequence[MetricPoint]) -> str:
    """Return the loss by step, of training and of validation; empty when there is neither.

    Long runs show the training loss pale and its exponential moving average (0.9) strong.
    """
    train = _series(points, "train_loss")
    validation = _series(points, "validation_loss")
    drawn = train + validation
    if not drawn:
        return ""
    ticks = _ticks(min(0.0, *(y for _, y in drawn)), max(y for _, y in drawn))
    steps = [x for x, _ in drawn]
    x = _Scale(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_horizontal_grid(ticks, y), _step_labels(min(steps), max(steps), x)]
    if len(train) > _SMOOTHED_FROM:
        parts += [_line("train-raw", train, x, y), _line("train", _smoothed(train), x, y)]
    elif train:
        parts.append(_line("train", train, x, y))
    if validation:
        parts.append(_line("validation", validation, x, y))
        parts += [f'<circle class="validation-dot" cx="{x(s)}" cy="{y(v)}" r="3.5"/>' for s, v in validation]
    parts.append(_legend(bool(train), bool(validation)))
    return _svg(_HEIGHT, "Loss by optimiser step", parts)


def interval_chart(score: str, estimates: Sequence[tuple[str, ScoreEstimate]]) -> str:
    """Return a row for each arm: the estimate as a dot on its 95 % interval. `estimates`: (arm, estimate)."""
    row, left, right = 34, 190, 190
    height = row * len(estimates) + 40
    shares = all(is_share(estimate) for _, estimate in estimates)
    highest = max(estimate.upper for _, estimate in estimates)
    lowest = min(0.0, *(estimate.lower for _, estimate in estimates))
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if shares else _ticks(lowest, highest)
    x = _Scale(ticks[0], ticks[-1], left, _WIDTH - right)
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid-line" x1="{x(tick)}" x2="{x(tick)}" y1="8" y2="{height - 26}"/>')
        text = f"{tick:.0%}" if shares else f"{tick:g}"
        parts.append(f'<text x="{x(tick)}" y="{height - 8}" text-anchor="middle">{text}</text>')
    for number, (arm, estimate) in enumerate(estimates):
        y = 8 + row * number + row / 2
        label = estimate_words(estimate)
        parts += [
            f'<text class="label" x="0" y="{y + 4}">{escaped_html(_shortened(arm))}</text>',
            f'<line class="whisker" x1="{x(estimate.lower)}" x2="{x(estimate.upper)}" y1="{y}" y2="{y}"/>',
            f'<circle class="estimate" cx="{x(estimate.value)}" cy="{y}" r="6.5"/>',
            f'<text x="{_WIDTH}" y="{y + 4}" text-anchor="end">{escaped_html(label)}</text>',
        ]
    return _svg(height, f"{score} by arm, with 95 % intervals", parts)


def curve_chart(points: Sequence[tuple[int, ScoreEstimate]], line: Sequence[tuple[int, float]]) -> str:
    """Return scores by the number of records, which has a logarithmic axis, with their intervals and a line."""
    shares = is_share(points[0][1])
    lows, highs = [one.lower for _, one in points], [one.upper for _, one in points]
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if shares else _ticks(min(lows), max(highs))
    counts = [count for count, _ in points]
    x = _Scale(math.log2(min(counts)), math.log2(max(counts)), _LEFT + 30, _WIDTH - _RIGHT - 30)
    y = _Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [_horizontal_grid(ticks, y, as_shares=shares)]
    parts.append(_line("train", [(x(math.log2(count)), value) for count, value in line], lambda at: at, y))
    for count, one in points:
        at = x(math.log2(count))
        parts += [
            f'<line class="whisker" x1="{at}" x2="{at}" y1="{y(one.lower)}" y2="{y(one.upper)}"/>',
            f'<circle class="estimate" cx="{at}" cy="{y(one.value)}" r="6.5"/>',
            f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{count:,}</text>',
        ]
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">records learnt from</text>')
    return _svg(_HEIGHT, f"{points[0][1].score} by records learnt from, with 95 % intervals", parts)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escaped_html(title)}">'
        f"<title>{escaped_html(title)}</title>{body}</svg>"
    )


def _series(points: Sequence[MetricPoint], key: str) -> list[tuple[int, float]]:
    return [
        (point.step, point.values[key])
        for point in points
        if key in point.values and math.isfinite(point.values[key])
    ]


def _smoothed(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    mean = series[0][1]
    made = []
    for step, value in series:
        mean = 0.9 * mean + 0.1 * value
        made.append((step, mean))
    return made


def _line(kind: str, series: Sequence[tuple[float, float]], x: Callable[[float], float], y: _Scale) -> str:
    path = " ".join(f"{x(step)},{y(value)}" for step, value in series)
    return f'<polyline class="{kind}" points="{path}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers that span [low, high]."""
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if span / (factor * magnitude) <= 6)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _horizontal_grid(ticks: Sequence[float], y: _Scale, *, as_shares: bool = False) -> str:
    form = "{:.0%}" if as_shares else "{:g}"
    return "".join(
        f'<line class="grid-line" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{_LEFT - 10}" y="{y(tick) + 4}" text-anchor="end">{form.format(tick)}</text>'
        for tick in ticks
    )


def _step_labels(first: int, last: int, x: _Scale) -> str:
    wanted = [tick for tick in _ticks(first, last) if first < tick < last and tick == int(tick)]
    steps = [first, *(int(tick) for tick in wanted), last]
    # The ends are always named; a round number too near to one of them would be written over it.
    kept = [
        step for step in steps if step in (first, last) or min(x(step) - x(first), x(last) - x(step)) > 40
    ]
    labels = "".join(
        f'<text x="{x(step)}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{step}</text>'
        for step in dict.fromkeys(kept)
    )
    return f'{labels}<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>'


def _legend(has_train: bool, has_validation: bool) -> str:
    parts = []
    left = _WIDTH - _RIGHT
    for shown, kind, text, width in (
        (has_validation, "validation", "validation loss", 120),
        (has_train, "train", "training loss", 112),
    ):
        if shown:
            left -= width
            parts.append(f'<line class="{kind}" x1="{left}" x2="{left + 20}" y1="12" y2="12"/>')
            parts.append(f'<text x="{left + 26}" y="16">{text}</text>')
    return "".join(parts)


def _shortened(text: str) -> str:
    return text if len(text) <= 26 else f"{text[:25]}…"
