"""How lengths are distributed, counted while they pass."""

from __future__ import annotations

from collections import Counter

from luthier.data.renderings.domain import LengthStatistics


class Lengths:
    """Counts of each length. Memory: one counter for each length that occurs, so at most the longest row."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        """Count one length."""
        self._counts[length] += 1

    def statistics(self) -> LengthStatistics:
        """Return the distribution; percentiles are the nearest rank, exact."""
        count = self._counts.total()
        if not count:
            return LengthStatistics()
        total = sum(length * times for length, times in self._counts.items())
        return LengthStatistics(
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
        rank = -(-percent * count // 100)
        reached = 0
        for length in sorted(self._counts):
            reached += self._counts[length]
            if reached >= rank:
                return length
        raise AssertionError("the counts add up to the rank")
