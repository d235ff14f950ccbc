"""Several ranks on one machine: a child each, whose end is the end of all.

They are started as torchrun would start them, with its environment, and without its agent: nothing starts again in
here. What is lost is the attempt, and the queue makes another one from the last checkpoint.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.training.executors.inline import STEP, InChild, calls_of
from luthier.training.executors.pulse import shown
from luthier.training.executors.ranks import RankOrder, pulse_path, ranks_for
from luthier.training.executors.vigil import Bounds, Vigil
from luthier.training.worker.order import Desk, RenderingRows, TrainEnd, TrainOrder
from luthier.work.child_watch import Overseer, Patience, Stalled
from luthier.work.children import Calls, Children
from luthier.work.events import Severity
from luthier.work.limited import Check
from luthier.work.machine import num_cores
from luthier.worker.v1 import task_pb2

_CAUSE_SECONDS = 2.0
"""A rank that lost another says so at once; what became of the other is known a moment later."""
_WHERE_SECONDS = 6.0
"""One that others wait for is looked into before it is ended: it writes where it is at."""
_OF_ALL = ("fetch", "fetch_into")
"""What every rank may ask for; all else is the first one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The ranks that a worker has.

    Attributes:
        num_ranks: how many; a job may take fewer.
        num_threads: torch's of each rank; 0: the processors, divided among the ranks of a job.
        bounds: how long one may go without a sign.
        patience: how long the steps may take.
    """

    num_ranks: int
    num_threads: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    patience: Patience = field(default_factory=Patience)


class GroupOverseer(Overseer, Protocol):
    """Who wants the work of several ranks: a task's context."""

    def checkpoint_stored(self, check: Check | None = None) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun, once the service has it, as long as `check` wants it."""
        ...


class Torchrun:
    """Trains on as many ranks as a job takes and a worker has, each one of `children`; on one as `InChild` does."""

    def __init__(self, children: Children, crew: Crew) -> None:
        self._children = children
        self._crew = crew
        self._inline = InChild(children)

    def __call__(self, order: TrainOrder, desk: Desk, context: GroupOverseer) -> TrainEnd:
        """Return what the first rank made, the others gone.

        Raises:
            Unavailable: TOO_FEW_RANKS; RANK_LOST, which names the rank; STALLED, no step was made for long, or a rank
                sleeps; RANKS_DIVERGED.
            ResourceExhausted: OUT_OF_MEMORY, of any rank.
            LuthierError: what the training raised, or the task's context.
        """
        num_ranks = ranks_for(order.task.train.job, self._crew.num_ranks)
        if num_ranks < self._crew.num_ranks:
            context.log(
                f"trains on {num_ranks} of this worker's {self._crew.num_ranks} ranks: ranks.max_ranks says no more"
            )
        if num_ranks == 1:
            return self._inline(order, desk, context)
        return _Group(self._children, self._crew, order, context, num_ranks).result(desk)


class _Over(Exception):
    """A rank is wanted no more, as the training has ended."""


class _Group:
    """The ranks of one training. A thread of this process waits for each of them."""

    def __init__(
        self, children: Children, crew: Crew, order: TrainOrder, context: GroupOverseer, num_ranks: int
    ) -> None:
        self._children = children
        self._crew = crew
        self._context = context
        self._meeting = order.scratch / "meeting"
        self._meeting.mkdir()
        self._num_ranks = num_ranks
        num_threads = crew.num_threads or max(1, num_cores() // num_ranks)
        self._orders = [
            RankOrder(
                order=_own(order, rank),
                rank=rank,
                num_ranks=num_ranks,
                meeting=self._meeting,
                num_threads=num_threads,
            )
            for rank in range(num_ranks)
        ]
        looks = [partial(shown, pulse_path(self._meeting, rank)) for rank in range(num_ranks)]
        self._vigil = Vigil(looks, crew.bounds)
        self._verdict: LuthierError | None = None
        self._hanging: dict[int, str] = {}
        self._over = threading.Event()
        self._gone: set[int] = set()
        self._bringing = threading.Lock()

    def result(self, desk: Desk) -> TrainEnd:
        """Run them to the end of the first one, or to the first failure. Raises as `Torchrun`."""
        # Who waits for the service hears that another rank is lost.
        stored = partial(self._context.checkpoint_stored, self.heed)
        of_first: Calls = {**calls_of(desk), "checkpoint_stored": stored}
        of_all = {name: self._one_by_one(of_first[name]) for name in _OF_ALL}
        with ThreadPoolExecutor(self._num_ranks, "rank") as threads:
            runs = {
                # Each in the context of the training: its span, and the fields of its lines.
                threads.submit(
                    copy_context().run, self._run, order, of_all if order.rank else {**of_first, **of_all}
                ): order.rank
                for order in self._orders
            }
            try:
                return self._awaited(runs)
            finally:
                self._over.set()

    def _awaited(self, runs: Mapping[Future[Any], int]) -> TrainEnd:
        pending, unexplained = set(runs), None
        while True:
            done, pending = wait(pending, self._cause_seconds(unexplained), FIRST_COMPLETED)
            if not done:
                assert unexplained is not None, "only then there is a limit"
                raise unexplained
            # What is the cause of the others comes first, and then the lowest rank.
            for run in sorted(done, key=lambda one: (self._is_consequence(one.exception()), runs[one])):
                error = run.exception()
                if error is None and runs[run] == 0:
                    result: TrainEnd = run.result()
                    return result
                if error is None:
                    self._gone.add(runs[run])
                elif self._is_consequence(error) or self._waited(error, runs[run]):
                    unexplained = unexplained or error
                else:
                    raise self._named(error, runs[run])
            if unexplained and not pending:
                raise unexplained

    def _is_consequence(self, error: BaseException | None) -> bool:
        """Whether a rank failed for want of another one, which says itself why it is gone."""
        is_lost = isinstance(error, LuthierError) and error.reason == Reason.RANK_LOST
        return is_lost and error is not self._verdict

    def _waited(self, error: BaseException, rank: int) -> bool:
        """Whether a rank made no step since it waited for others, which are asked where they are then, and ended."""
        if not isinstance(error, LuthierError) or error.reason != Reason.STALLED or rank in self._hanging:
            return False
        awaited = self._vigil.awaited(tuple(self._gone))
        if rank in awaited:
            return False
        self._hanging.update(dict.fromkeys(awaited, f"the others wait for it: {error.message}"))
        return bool(awaited)

    def _cause_seconds(self, unexplained: BaseException | None) -> float | None:
        """Return how long to wait for why ranks are gone that said no reason of their own."""
        if unexplained is None:
            return None
        return _WHERE_SECONDS if self._hanging else _CAUSE_SECONDS

    def _named(self, error: BaseException, rank: int) -> BaseException:
        """Return the error of a rank that is gone, or hangs, as that of the group."""
        if not isinstance(error, LuthierError) or error.reason not in (Reason.CRASHED, Reason.STALLED):
            return error
        is_gone = error.reason == Reason.CRASHED
        return Unavailable(
            f"rank {rank} of {self._num_ranks} {'is lost' if is_gone else 'hangs'}: {error.message}",
            reason=Reason.RANK_LOST if is_gone else Reason.STALLED,
            metadata={**error.metadata, "rank": str(rank)},
        )

    def _run(self, order: RankOrder, calls: Mapping[str, Callable[..., Any]]) -> Any:
        step = STEP if order.rank == 0 else ""
        overseer = _Overseer(self, order.rank)
        # A rank that waits for another stands still, for as long as the other computes: the vigil tells them apart.
        patience = replace(self._crew.patience, still_seconds=math.inf)
        return self._children.run(order, calls, overseer, step, patience=patience)

    def _one_by_one(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that ranks make one after the other: what one fetched the next finds here."""

        def called(*arguments: Any) -> Any:
            with self._bringing:
                return call(*arguments)

        return called

    def check(self) -> None:
        """A rank shows a sign of life. Raises as `heed`."""
        self.heed()
        self._context.check()

    def heed(self) -> None:
        """Return while the training is wanted and all ranks go on, or hang so that each is asked where it is.

        Raises what ends it.
        """
        if self._over.is_set():
            raise _Over
        self._context.heed()
        try:
            self._vigil.look(tuple(self._gone))
        except Unavailable as error:
            if error.reason == Reason.STALLED:
                rank = int(error.metadata["rank"])
                how = error.message.removeprefix(f"rank {rank} of {self._num_ranks} ")
                self._hanging.setdefault(rank, f"it {how}")
                return
            self._verdict = error
            raise

    def require_moving(self, rank: int) -> None:
        """Return while a rank does not hang.

        Raises:
            Stalled: it does; whoever watches it has it say where.
        """
        if rank in self._hanging:
            raise Stalled(self._hanging[rank])

    def log(self, text: str, severity: Severity) -> None:
        """Report a line for people."""
        self._context.log(text, severity)


class _Overseer:
    """Who wants the work of one rank."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self._rank = rank
        self.check = group.check

    def heed(self) -> None:
        """Return while the work is wanted. Raises as the group's, and where this rank hangs."""
        self._group.heed()
        self._group.require_moving(self._rank)

    def log(self, text: str, severity: Severity = "INFO") -> None:
        """Report a line for people, with the rank."""
        self._group.log(f"rank {self._rank}: {text}", severity)


def _own(order: TrainOrder, rank: int) -> TrainOrder:
    """Return a training with a folder of a rank's own, and its rows there: whoever reads them deletes them."""
    scratch = order.scratch / f"rank-{rank}"
    scratch.mkdir()
    return replace(
        order,
        scratch=scratch,
        renderings=tuple(_linked(rows, scratch) for rows in order.renderings),
    )


def _linked(rows: RenderingRows, folder: Path) -> RenderingRows:
    path = folder / rows.path.name
    path.hardlink_to(rows.path)
    return replace(rows, path=path)
