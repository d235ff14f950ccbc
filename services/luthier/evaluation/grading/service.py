"""Graders tried on given answers: remote ones asked, all else calculated in limited processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from luthier.errors import Cancelled, Internal, InvalidArgument, Reason, ResourceExhausted
from luthier.evaluation.grading import rules
from luthier.evaluation.grading.samples import SampleGrader, grading_pool
from luthier.grading.asked import remote_addresses, remote_graders
from luthier.runtime.names import PROJECT
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest
from luthier.v1.grader_pb2 import SampleGrade
from luthier.work.limited import Check, LimitReached, ProcessBroken
from luthier.work.rewards import RewardAddresses, RewardError, scored

T = TypeVar("T")
MAX_GRADINGS = 8
"""Calls that grade at once; each waits in a thread of its own."""
_PROCESSES = 2
_WAIT_SECONDS = 20.0
_SAMPLES_AN_ANSWER = 16
_RETRY_SECONDS = 2.0
_Rewards = Mapping[str, Sequence[float | RewardError]]


class GradingService:
    """Grades samples. Nothing is stored. Memory: what one request holds, and the processes."""

    def __init__(self, allowed: RewardAddresses) -> None:
        self._allowed = allowed
        self._pool = grading_pool(_PROCESSES, _WAIT_SECONDS)
        # Threads of its own: they wait for processes and for reward services, and the event loop's are for short work.
        self._threads = ThreadPoolExecutor(MAX_GRADINGS, thread_name_prefix="grading")
        self._running = 0

    async def grade(self, request: GradeSamplesRequest) -> AsyncIterator[list[SampleGrade]]:
        """Yield the grades of the next samples, until there is one for each.

        Raises:
            InvalidArgument: a field is not valid, ADDRESS_NOT_ALLOWED; GRADING_LIMIT_REACHED, a sample takes too much.
            ResourceExhausted: OVERLOADED, too many others grade.
            Unavailable: the service stops.
        """
        project = PROJECT.parse(request.parent, field="parent")["project"]
        rules.check(request)
        for field, address in remote_addresses(request.grader, "grader"):
            self._allowed.require(address, field)
        if self._running >= MAX_GRADINGS:
            raise ResourceExhausted(
                f"{self._running} calls grade samples already, the limit is {MAX_GRADINGS}",
                reason=Reason.OVERLOADED,
                retry_after_seconds=_RETRY_SECONDS,
            )
        self._running += 1
        unwanted = threading.Event()

        def check() -> None:
            if unwanted.is_set():
                raise Cancelled("nobody waits for these grades any more")

        try:
            rewards = await self._aside(partial(self._rewards, request, check))
            for start in range(0, len(request.samples), _SAMPLES_AN_ANSWER):
                some = range(start, min(start + _SAMPLES_AN_ANSWER, len(request.samples)))
                yield await self._aside(partial(self._grades, project, request, some, rewards, check))
        finally:
            unwanted.set()
            self._running -= 1

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _rewards(self, request: GradeSamplesRequest, check: Check) -> _Rewards:
        return {
            path: scored(remote, request.samples, self._allowed, check)
            for path, remote in remote_graders(request.grader)
        }

    def _grades(
        self, project: str, request: GradeSamplesRequest, some: range, rewards: _Rewards, check: Check
    ) -> list[SampleGrade]:
        grader = SampleGrader.of(self._pool, project, request.grader)
        grades = []
        for place in some:
            remote = {path: found[place] for path, found in rewards.items()}
            try:
                grades.append(grader.grade(request.samples[place], remote, check))
            except LimitReached as error:
                raise InvalidArgument(
                    f"samples[{place}]: grading it takes more than {error}; send shorter texts or fewer graders",
                    reason=Reason.GRADING_LIMIT_REACHED,
                    metadata={"sample": str(place)},
                ) from error
            except ProcessBroken as error:
                raise Internal(f"samples[{place}] cannot be graded: {error}") from error
        return grades
