"""The table, the picture and the JSON of benchmarks/scaling.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

BEGIN = "<!-- made by benchmarks/scaling.py -->"
END = "<!-- end of what benchmarks/scaling.py made -->"
SHOWN = (8, 64, 256, 1024)
_COLOURS = ("#1b6ca8", "#2a9d8f", "#8ab17d", "#e9a23b", "#e76f51", "#9b2226")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A setting and what it comes to: names as `scaling.Setting` and `scaling.Outcome` have them."""

    machine: str
    trains: str
    step_tokens: int
    model: str
    sharding: str
    num_gpus: int
    pass_tokens: int
    kept: str
    memory: float
    sent: float
    step_seconds: float
    waiting: float
    efficiency: float


def as_json(rows: Sequence[Row]) -> str:
    """Return all rows, one a line, numbers of four digits."""
    lines = [
        json.dumps(
            {
                name: float(f"{value:.4g}") if isinstance(value, float) else value
                for name, value in asdict(row).items()
            }
        )
        for row in rows
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def limits(rows: Sequence[Row], enough: float) -> dict[str, int]:
    """Return the most GPUs at which each way is still efficient enough, by its name; 0: at none."""
    found: dict[str, int] = {}
    for row in rows:
        name = f"{row.machine}, {row.trains}, {row.step_tokens} tokens, {row.model}, {row.sharding}"
        found[name] = max(found.get(name, 0), row.num_gpus if row.efficiency >= enough else 0)
    return found


def with_tables(page: str, rows: Sequence[Row], enough: float) -> str:
    """Return the page with the tables between the marks replaced. Raises ValueError where the marks are missing."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the page must have the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables(rows, enough)}\n{END}{after}"


def tables(rows: Sequence[Row], enough: float) -> str:
    """Return a table for each machine and what is trained."""
    parts = []
    for machine in dict.fromkeys(row.machine for row in rows):
        for trains in dict.fromkeys(row.trains for row in rows):
            parts.append(f"**{trains}; between machines {machine}**\n")
            parts.append(
                _table([row for row in rows if (row.machine, row.trains) == (machine, trains)], enough)
            )
    return "\n".join(parts)


def _table(rows: Sequence[Row], enough: float) -> str:
    sizes = list(dict.fromkeys(row.step_tokens for row in rows))
    titles = [f"{count:,} GPUs" for count in SHOWN]
    ends = [f"ends at, {size:,} tokens" for size in sizes]
    lines = [
        "| | | memory on 8 | " + " | ".join(titles) + " | " + " | ".join(ends) + " |",
        "|---|---|---|" + "---|" * (len(titles) + len(ends)),
    ]
    most = limits(rows, enough)
    for model in dict.fromkeys(row.model for row in rows):
        for sharding in dict.fromkeys(row.sharding for row in rows):
            ours = [row for row in rows if (row.model, row.sharding) == (model, sharding)]
            large = {row.num_gpus: row for row in ours if row.step_tokens == max(sizes)}
            cells = [_cell(large[count]) for count in SHOWN]
            stops = [
                _stop(
                    max(most[name] for name in most if name.endswith(f" {size} tokens, {model}, {sharding}"))
                )
                for size in sizes
            ]
            memory = f"{large[8].memory / 1e9:,.0f} GB {large[8].kept}".rstrip()
            lines.append(f"| {model} | {sharding} | {memory} | " + " | ".join([*cells, *stops]) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if not row.kept:
        return "does not fit"
    return f"{size_text(row.sent)}, {row.efficiency:.0%}"


def _stop(count: int) -> str:
    if count == SHOWN[-1]:
        return f"not by {count:,}"
    return f"{count:,}" if count else "fits none"


def size_text(size: float) -> str:
    """Return bytes for people."""
    for unit, amount in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= amount:
            return f"{size / amount:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def picture(rows: Sequence[Row]) -> str:
    """Return efficiency by GPUs: panels by machine, what is trained and step, lines by model and sharding."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    columns = list(dict.fromkeys((row.trains, row.step_tokens) for row in rows))
    models = list(dict.fromkeys(row.model for row in rows))
    parts = []
    for down, machine in enumerate(machines):
        for across, (trains, size) in enumerate(columns):
            ours = [
                row for row in rows if (row.machine, row.trains, row.step_tokens) == (machine, trains, size)
            ]
            title = f"{trains}; {size:,} tokens; {machine}"
            parts.append(_panel(50 + across * 300, 50 + down * 240, title, ours, models))
    legend = "".join(
        f'<text x="{60 + number * 70}" y="20" fill="{_COLOURS[number]}" font-weight="bold">{model}</text>'
        for number, model in enumerate(models)
    )
    legend += '<text x="520" y="20">solid: replicated, dashed: fsdp2; a line begins where it fits</text>'
    width, height = 50 + 300 * len(columns), 50 + 240 * len(machines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{legend}{"".join(parts)}</svg>\n'
    )


def _panel(left: int, top: int, title: str, rows: Sequence[Row], models: Sequence[str]) -> str:
    width, height = 250, 180
    counts = sorted({row.num_gpus for row in rows})
    places = {count: left + width * number / (len(counts) - 1) for number, count in enumerate(counts)}
    parts = [f'<text x="{left}" y="{top - 8}">{title}</text>']
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:g}" y2="{y:g}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 32}" y="{y + 4:g}">{share:.0%}</text>')
    parts += [
        f'<text x="{place - 8:.0f}" y="{top + height + 15}">{count}</text>' for count, place in places.items()
    ]
    for model in models:
        for sharding in ("replicated", "fsdp2"):
            points = [
                f"{places[row.num_gpus]:.1f},{top + height * (1 - min(1.0, row.efficiency)):.1f}"
                for row in rows
                if (row.model, row.sharding) == (model, sharding) and row.kept
            ]
            dashes = ' stroke-dasharray="4 3"' if sharding == "fsdp2" else ""
            colour = _COLOURS[models.index(model)]
            parts.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'
            )
    return "".join(parts)
