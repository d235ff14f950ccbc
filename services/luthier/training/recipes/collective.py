"""What the ranks of a run do together. One rank is the plain case, and the only one today."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """Sums over all ranks, which call the same methods in the same order; every rank gets the same bits."""

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over the ranks: counts, and sums that counts divide."""
        ...

    def sum_squares(self, square: float) -> float:
        """Return the squared norm of all gradients, of which a rank gives that of the parts that it holds."""
        ...

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Put the sum over the ranks into each tensor, in place."""
        ...


class OneRank:
    """A run of one rank: every sum is what the rank has."""

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        """Return the numbers themselves."""
        return list(values)

    def sum_squares(self, square: float) -> float:
        """Return the square itself."""
        return square

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Leave the gradients as they are."""
