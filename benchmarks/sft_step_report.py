"""What `sft_step.py` makes of its measurements: the summary, the table, the picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

Outcome = Mapping[str, Any]
"""One contender's part of the results: `error`, or medians and what they were taken from."""

_COLOURS = {
    "matmul": "#31688e",
    "attention": "#35b779",
    "loss and vocabulary": "#b4452f",
    "element-wise": "#e0a030",
    "copies and casts": "#8b6db0",
    "optimiser": "#777777",
    "Python and the rest": "#c8c8c8",
}
NUM_GROUPS = 5


def outcome_of(runs: Sequence[Mapping[str, Any]], profiled: Mapping[str, Any] | None) -> dict[str, Any]:
    """Medians over a contender's rounds; the first step of each run is not timed, but its loss is kept.

    Args:
        runs: what `measure` returned in each round; the first holds the held-out loss.
        profiled: what it returned when it profiled, or the `error` why it could not; None: not asked for.
    """
    speeds = [sum(run["step_tokens"][1:]) / sum(run["step_seconds"][1:]) for run in runs]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_by_round": speeds,
        "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in runs),
        "heldout_loss": runs[0]["heldout_loss"],
        "losses": runs[0]["losses"],
        "first_step_seconds": statistics.median(run["step_seconds"][0] for run in runs),
        "places_per_token": runs[0]["places_per_token"],
        "threads": runs[0]["threads"],
        "costs": profiled.get("costs") if profiled else None,
        "profile_error": profiled.get("error") if profiled else None,
    }


def summary_of(
    outcomes: Mapping[str, Outcome],
    ours: Sequence[str],
    defaults: str,
    reference: str,
    speed_key: str = "tps_vs_best_peer",
) -> dict[str, Any]:
    """The figures that releases are compared by; None where a contender that it needs did not run.

    Args:
        outcomes: by contender.
        ours: contenders that are no peers; the first is the one compared.
        defaults: the contender of TRL's defaults.
        reference: whose held-out loss is compared with.
        speed_key: name of the first figure: our tokens/s by those of the fastest peer.
    """
    done = {name: outcome for name, outcome in outcomes.items() if "error" not in outcome}
    peers = [name for name in done if name not in ours]
    best = max(peers, key=lambda name: float(done[name]["tokens_per_second"]), default=None)

    def ratio(other: str | None, key: str) -> float | None:
        if ours[0] not in done or other not in done:
            return None
        return round(float(done[ours[0]][key]) / float(done[other][key]), 3)

    gap = None
    if ours[0] in done and reference in done:
        expected = done[reference]["heldout_loss"]
        gap = round(abs(done[ours[0]]["heldout_loss"] - expected) / expected, 6)
    return {
        speed_key: ratio(best, "tokens_per_second"),
        "best_peer": best,
        "rss_vs_best_peer": ratio(best, "peak_rss_bytes"),
        "tps_vs_trl_defaults": ratio(defaults, "tokens_per_second"),
        "rss_vs_trl_defaults": ratio(defaults, "peak_rss_bytes"),
        "heldout_loss_gap": gap,
    }


def table(outcomes: Mapping[str, Outcome], configurations: Mapping[str, str]) -> str:
    """The results as text."""
    lines = [f"{'contender':22}{'tokens/s':>10}{'peak GB':>10}{'held-out':>10}{'padding':>9}"]
    for name, outcome in outcomes.items():
        if "error" in outcome:
            lines.append(f"{name:22}  did not run: {outcome['error']}")
            continue
        lines.append(
            f"{name:22}{outcome['tokens_per_second']:>10.1f}{outcome['peak_rss_bytes'] / 1e9:>10.2f}"
            f"{outcome['heldout_loss']:>10.5f}{100 * (outcome['places_per_token'] - 1):>8.0f}%"
        )
    lines.append("\nwhere a step's time goes (one profiled step, slower than an unprofiled one):")
    for name, outcome in outcomes.items():
        if outcome.get("costs"):
            lines.append(f"{name:22}  {_shares(outcome['costs'])}")
        elif outcome.get("profile_error"):
            lines.append(f"{name:22}  not profiled: {outcome['profile_error']}")
    lines.append("\nconfigurations:")
    lines += [f"{name:22}  {configurations[name]}" for name in outcomes]
    return "\n".join(lines)


def _shares(costs: Mapping[str, Any]) -> str:
    groups = list(costs["groups"].items())[:NUM_GROUPS]
    return ", ".join(f"{group} {one:.2f} s ({100 * one / costs['seconds']:.0f} %)" for group, one in groups)


def picture(outcomes: Mapping[str, Outcome], what: str) -> str:
    """Bars of speed and memory for each contender, and where the time of its step goes, as SVG; `what`: is trained."""
    done = {name: outcome for name, outcome in outcomes.items() if "error" not in outcome}
    fastest = max((one["tokens_per_second"] for one in done.values()), default=1.0)
    largest = max((one["peak_rss_bytes"] for one in done.values()), default=1.0)
    step, left = 46, 180
    title = f"One {what} fine-tuning step: the same rows for all"
    parts = [f'<text x="20" y="22" font-weight="bold">{escape(title)}</text>']
    parts += [_text(left, 44, "real tokens/s"), _text(470, 44, "peak RSS"), _text(700, 44, "where time goes")]
    for index, (name, outcome) in enumerate(done.items()):
        y = 56 + index * step
        speed, memory = outcome["tokens_per_second"], outcome["peak_rss_bytes"]
        parts.append(f'<text x="{left - 10}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            _bar(left, y, 220 * speed / fastest, "#2f7d4f" if name.startswith("ours") else "#8a8a8a")
        )
        parts.append(_text(left + 226 * speed / fastest + 4, y + 16, f"{speed:.0f}"))
        parts.append(_bar(470, y, 150 * memory / largest, "#4a6fa5"))
        parts.append(_text(474 + 150 * memory / largest, y + 16, f"{memory / 1e9:.1f} GB"))
        parts += _stack(700, y, outcome["costs"])
    bottom = 72 + len(done) * step
    for index, (group, colour) in enumerate(_COLOURS.items()):
        parts.append(_bar(20 + index * 150, bottom, 12, colour))
        parts.append(_text(36 + index * 150, bottom + 16, group))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1090" height="{bottom + 36}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _stack(x: float, y: float, costs: Mapping[str, Any] | None) -> list[str]:
    parts = []
    for group, seconds in (costs["groups"] if costs else {}).items():
        width = 360 * seconds / sum(costs["groups"].values()) if costs else 0.0
        parts.append(_bar(x, y, width, _COLOURS[group]))
        x += width
    return parts


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="22" fill="{colour}"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
