"""Ranks in processes of their own, which torch.distributed joins (gloo, NCCL, RCCL).

Where each has all of the weights, there is no DDP around the model: gradients are summed once a step, in flat tensors
of at most 32 MiB, so that a step of many passes sends as much as one of a single pass. Ranks that have parts: `shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.errors import Reason, Unavailable
from luthier.training.recipes.exchanges import buckets

T = TypeVar("T")
_BYTES_OF_OBJECT = 1 << 20
"""What is said of the size of an object, which is known only once it has come."""


class Meetings(Protocol):
    """Is told when a rank waits for the others, so that one who watches all can tell who does not come."""

    def enter(self, num_bytes: int) -> None:
        """Note that the rank waits for the others, to exchange so many bytes."""
        ...

    def leave(self) -> None:
        """Note that it has what they exchanged."""
        ...


class Replicas:
    """The ranks of the process group of this process: a `Collective`.

    A call returns when it is done, on a GPU too. It waits for as long as another rank takes: who watches the ranks ends
    them where one does not come. What differs between their processors ends at the sums, whose bits all ranks share.

    Args:
        device: where tensors are exchanged: what the process group's backend takes.
        meetings: told of each exchange.
        passes_together: whether passes are made by all ranks at once.
    """

    def __init__(self, device: torch.device, meetings: Meetings, *, passes_together: bool = False) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.passes_together = passes_together
        self._device = device
        self._meetings = meetings
        self._begun: list[_Begun] = []

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each number over the ranks, added in float64. Raises as `sum_gradients`."""
        if not values:
            return []
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        with self.exchange(sums.nbytes):
            dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Put the sum over the ranks into each tensor, float32, in place, of small ones many at once.

        Takes 32 MiB meanwhile, `exchanges.PIECE_BYTES`.

        Raises:
            Unavailable: RANK_LOST, a rank is gone.
        """
        assert all(one.dtype == torch.float32 for one in gradients), "sums are in float32"
        for together in buckets(gradients):
            is_alone = len(together) == 1 and together[0].is_contiguous()
            flat = together[0] if is_alone else torch.cat([one.reshape(-1) for one in together])
            with self.exchange(flat.nbytes):
                dist.all_reduce(flat)
            if not is_alone:
                parts = torch.split(flat, [gradient.numel() for gradient in together])
                for gradient, part in zip(together, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))

    def gathered(self, value: T) -> list[T]:
        """Return what each rank gave, in their order: whatever can be pickled. Raises as `sum_gradients`."""
        found: list[Any] = [None] * self.num_ranks
        with self.exchange(_BYTES_OF_OBJECT):
            dist.all_gather_object(found, value)
        return found

    def of_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank: whatever can be pickled. Raises as `sum_gradients`."""
        found: list[Any] = [make() if self.rank == 0 else None]
        with self.exchange(_BYTES_OF_OBJECT):
            dist.broadcast_object_list(found, src=0, device=self._device)
        value: T = found[0]
        return value

    @contextmanager
    def exchange(self, num_bytes: int, *, is_awaited: bool = True) -> Iterator[None]:
        """Give a block in which ranks exchange so many bytes; at its end they have, on a GPU where it is awaited.

        An awaited one awaits those first that were begun before it and not awaited, each as a meeting of its own.

        Raises as `sum_gradients`.
        """
        before = None
        if is_awaited:
            self._await_begun()
            # What a GPU was given before is still being computed, which may take longer than any exchange.
            self._await_device()
        else:
            before = self._mark()
        with self._meeting(num_bytes):
            yield
            if is_awaited:
                self._await_device()
        after = None if is_awaited else self._mark()
        if before is not None and after is not None:
            self._begun.append(_Begun(num_bytes, before, after))

    def _await_begun(self) -> None:
        """Await what was begun, also where a look would show that it is done: all ranks count the same meetings."""
        begun, self._begun = self._begun, []
        for one in begun:
            one.before.synchronize()
            with self._meeting(one.num_bytes):
                one.after.synchronize()

    @contextmanager
    def _meeting(self, num_bytes: int) -> Iterator[None]:
        self._meetings.enter(num_bytes)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        # Every backend has errors of its own, and gloo the plain one.
        except RuntimeError as error:
            raise Unavailable(
                f"rank {self.rank} of {self.num_ranks} does not reach the others: {str(error)[:300]}",
                reason=Reason.RANK_LOST,
                metadata={"rank": str(self.rank)},
            ) from error
        self._meetings.leave()

    def _mark(self) -> torch.cuda.Event | None:
        """Return an event behind all that the current stream of a GPU was given; None elsewhere."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch gives it no types
        event.record()
        return event

    def _await_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Begun(NamedTuple):
    """An exchange that was begun and not awaited, between two events of the stream that it is in."""

    num_bytes: int
    before: torch.cuda.Event
    after: torch.cuda.Event
