"""Statistics of lengths, exact and in bounded memory: a count for each length seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """How a length is distributed; all zero when nothing was counted."""

    count: int
    sum: int
    minimum: int
    maximum: int
    mean: float
    p5: int
    p50: int
    p95: int


class Lengths:
    """Counts lengths; memory grows with the number of different lengths only."""

    def __init__(self, lengths: Iterable[int] = ()) -> None:
        self._counts: Counter[int] = Counter(lengths)

    def add(self, length: int) -> None:
        """Count one length."""
        self._counts[length] += 1

    @property
    def count(self) -> int:
        """How many were counted."""
        return self._counts.total()

    def summary(self) -> LengthSummary:
        """Return the distribution; percentiles are nearest-rank."""
        count = self._counts.total()
        if count == 0:
            return LengthSummary(count=0, sum=0, minimum=0, maximum=0, mean=0.0, p5=0, p50=0, p95=0)
        total = sum(length * times for length, times in self._counts.items())
        return LengthSummary(
            count=count,
            sum=total,
            minimum=min(self._counts),
            maximum=max(self._counts),
            mean=total / count,
            p5=self._percentile(5, count),
            p50=self._percentile(50, count),
            p95=self._percentile(95, count),
        )

    def _percentile(self, percent: int, count: int) -> int:
        rank = -(-percent * count // 100)  # the ceiling, as nearest-rank has it
        seen = 0
        for length in sorted(self._counts):
            seen += self._counts[length]
            if seen >= rank:
                return length
        raise AssertionError("the counts add up to count")
