"""Which renderings a run mixes, and by which shares. Nothing but the standard library is used.

Their rows are numbered through: those of the run's own rendering as it numbers them itself, those of each other one on
from where the one before it ends.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Measure = Literal["TOKENS", "UNITS"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Several renderings, the run's own first; the four sequences are equally long.

    Attributes:
        names: what they are called.
        first_rows: number of the first row of each, from 0 on.
        shares: of each in what is learnt; above 0, and they add up to 1.
        measure: what shares are of: learnt tokens, or units.
    """

    names: tuple[str, ...]
    first_rows: tuple[int, ...]
    shares: tuple[float, ...]
    measure: Measure

    def source(self, row: int) -> int:
        """Return whose row a number is: the place of its rendering."""
        return bisect_right(self.first_rows, row) - 1

    def numbered(self, row: int) -> tuple[int, int]:
        """Return the place of the rendering that a row is of, and its number there."""
        source = self.source(row)
        return source, row - self.first_rows[source]

    def place(self, row: int) -> tuple[str, int]:
        """Return the rendering that a row is of, and its number there."""
        source, number = self.numbered(row)
        return self.names[source], number


def row_named(row: int, mixture: Mixture | None) -> str:
    """Return how people know a row: its number, and of a mixture the rendering where it has it."""
    if mixture is None:
        return str(row)
    name, number = mixture.place(row)
    return f"{number} of {name}"


def rows_named(rows: Sequence[int], mixture: Mixture | None) -> str:
    """Return how people know some rows, in their order; those of one rendering that follow one another together."""
    if mixture is None:
        return ", ".join(map(str, rows))
    return places_named([mixture.place(row) for row in rows])


def places_named(places: Iterable[tuple[str, int]]) -> str:
    """Return the same of rows of which each is known by its rendering and its number there."""
    runs: list[tuple[str, list[str]]] = []
    for name, number in places:
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(str(number))
    return "; ".join(f"{', '.join(numbers)} of {name}" for name, numbers in runs)


def row_listed(row: int, mixture: Mixture | None) -> Mapping[str, str]:
    """Return a row as an error's metadata has it: its number, and of a mixture its rendering."""
    if mixture is None:
        return {"row": str(row)}
    name, number = mixture.place(row)
    return {"row": str(number), "rendering": name}


def rows_listed(rows: Sequence[int], mixture: Mixture | None) -> Mapping[str, str]:
    """Return rows as an error's metadata lists them: their numbers, and of a mixture the rendering of each."""
    if mixture is None:
        return {"rows": ",".join(map(str, rows))}
    return places_listed([mixture.place(row) for row in rows])


def places_listed(places: Sequence[tuple[str, int]]) -> Mapping[str, str]:
    """Return the same of rows of which each is known by its rendering and its number there."""
    return {
        "rows": ",".join(str(number) for _, number in places),
        "renderings": ",".join(name for name, _ in places),
    }
