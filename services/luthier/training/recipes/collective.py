"""What the ranks of a run do together. One rank is the plain case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Collective(Protocol):
    """What is known and summed of all ranks, which call the same methods in the same order.

    Every rank gets the same bits, so that what is decided by them all ranks decide alike.

    Attributes:
        rank: the place of this one, from 0. The first tells, stores and grades for all.
        num_ranks: how many there are.
        passes_together: whether a forward pass is made by all ranks at once or by none, as each has a part of the
            weights.
    """

    rank: int
    num_ranks: int
    passes_together: bool

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over the ranks: counts, and sums that counts divide."""
        ...

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Put the sum over the ranks into each tensor, float32, in place."""
        ...

    def gathered(self, value: T) -> list[T]:
        """Return what each rank gave, in their order."""
        ...

    def exchange(self, num_bytes: int, *, is_awaited: bool = True) -> AbstractContextManager[None]:
        """Return a block in which all ranks exchange so many bytes by themselves, and wait for them or go on."""
        ...

    def of_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, where alone it is called; the others wait for it."""
        ...


class OneRank:
    """A run of one rank: every sum is what the rank has."""

    rank = 0
    num_ranks = 1
    passes_together = False

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        """Return the numbers themselves."""
        return list(values)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Leave the gradients as they are."""

    def gathered(self, value: T) -> list[T]:
        """Return what the rank gave."""
        return [value]

    def exchange(self, num_bytes: int, *, is_awaited: bool = True) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return a block."""
        return nullcontext()

    def of_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns."""
        return make()


def dealt(batches: Sequence[T], collective: Collective) -> list[tuple[T, bool]]:
    """Return those of some batches that a rank takes, and of each whether it counts.

    They go round, so that no rank has two more than another. Where passes are made together, a rank that has one less
    makes the last one too, which counts for nothing there. What is summed of those that count is divided by counts of
    all batches: their number and order change it by rounding alone.
    """
    own = [(batch, True) for batch in batches[collective.rank :: collective.num_ranks]]
    most = -(-len(batches) // collective.num_ranks)
    if collective.passes_together and len(own) < most:
        own.append((batches[-1], False))
    return own


def share_of(count: int, collective: Collective) -> range:
    """Return which of so many things in a row a rank takes: a run of them, in the order of the ranks."""
    first, last = (count * (collective.rank + more) // collective.num_ranks for more in (0, 1))
    return range(first, last)
