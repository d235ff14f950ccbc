"""Graders tried on given answers: reward services and models asked, all else calculated in limited processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from luthier.errors import Cancelled, Internal, InvalidArgument, Reason, ResourceExhausted
from luthier.evaluation.grading import rules
from luthier.evaluation.grading.samples import SampleGrader, grading_pool, value_of
from luthier.evaluation.reward_models import FoundReward, check_names, named_by_grader
from luthier.grading.asked import remote_addresses, remote_graders, reward_model_graders
from luthier.runtime.names import PROJECT
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest
from luthier.v1.grader_pb2 import Sample, SampleGrade
from luthier.work.limited import Check, LimitReached, ProcessBroken
from luthier.work.rewards import RewardAddresses, RewardError, scored

T = TypeVar("T")
MAX_GRADINGS = 8
"""Calls that grade at once; each waits in a thread of its own."""
_PROCESSES = 2
_WAIT_SECONDS = 20.0
_SAMPLES_AN_ANSWER = 16
_RETRY_SECONDS = 2.0
_Outcomes = Mapping[str, Sequence[float | RewardError]]
"""What reward services, or reward models, said of all samples, by the path of the grader."""


class Valuing(Protocol):
    """Where samples are valued by reward models."""

    async def find(self, named: Iterable[tuple[str, str]]) -> Mapping[str, FoundReward]:
        """Return reward models, each given after its field, by their names. Raises LuthierError."""
        ...

    async def of(self, found: FoundReward, samples: Sequence[Sample]) -> Sequence[SampleGrade]:
        """Return what a reward model values each sample at. Raises LuthierError."""
        ...


class GradingService:
    """Grades samples. Nothing is stored. Memory: what one request holds, and the processes."""

    def __init__(self, allowed: RewardAddresses, values: Valuing) -> None:
        self._allowed = allowed
        self._values = values
        self._pool = grading_pool(_PROCESSES, _WAIT_SECONDS)
        # Threads of its own: they wait for processes and for reward services, and the event loop's are for short work.
        self._threads = ThreadPoolExecutor(MAX_GRADINGS, thread_name_prefix="grading")
        self._running = 0

    async def grade(self, request: GradeSamplesRequest) -> AsyncIterator[list[SampleGrade]]:
        """Yield the grades of the next samples, until there is one for each.

        Raises:
            InvalidArgument: a field is not valid, ADDRESS_NOT_ALLOWED, REWARD_MODEL_EXPECTED; GRADING_LIMIT_REACHED, a
                sample takes too much.
            NotFound, FailedPrecondition: a reward model does not exist, or is not READY.
            ResourceExhausted: OVERLOADED, too many others grade, or wait for a worker.
            Unavailable: the service stops; NO_WORKER, there is none to value samples.
        """
        project = PROJECT.parse(request.parent, field="parent")["project"]
        rules.check(request)
        for field, address in remote_addresses(request.grader, "grader"):
            self._allowed.require(address, field)
        named = list(named_by_grader(request.grader))
        check_names(named)
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
            values = await self._valued(request, await self._values.find(named))
            grading = _Grading(
                grader=SampleGrader.of(self._pool, project, request.grader),
                samples=request.samples,
                remote=await self._aside(partial(self._rewards, request, check)),
                values=values,
                check=check,
            )
            for start in range(0, len(request.samples), _SAMPLES_AN_ANSWER):
                some = range(start, min(start + _SAMPLES_AN_ANSWER, len(request.samples)))
                yield await self._aside(partial(grading.grades, some))
        finally:
            unwanted.set()
            self._running -= 1

    def close(self) -> None:
        """End the processes."""
        self._pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _rewards(self, request: GradeSamplesRequest, check: Check) -> _Outcomes:
        return {
            path: scored(remote, request.samples, self._allowed, check)
            for path, remote in remote_graders(request.grader)
        }

    async def _valued(self, request: GradeSamplesRequest, found: Mapping[str, FoundReward]) -> _Outcomes:
        by_name = {name: await self._values.of(one, request.samples) for name, one in found.items()}
        return {
            path: [value_of(grade) for grade in by_name[one.model]]
            for path, one in reward_model_graders(request.grader)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grading:
    """Samples that are graded, and what reward services and reward models said of them."""

    grader: SampleGrader
    samples: Sequence[Sample]
    remote: _Outcomes
    values: _Outcomes
    check: Check

    def grades(self, some: range) -> list[SampleGrade]:
        """Return the grades of some of the samples. Raises as `GradingService.grade`."""
        grades = []
        for place in some:
            remote, values = (
                {path: found[place] for path, found in said.items()} for said in (self.remote, self.values)
            )
            try:
                grades.append(self.grader.grade(self.samples[place], remote, values, self.check))
            except LimitReached as error:
                raise InvalidArgument(
                    f"samples[{place}]: grading it takes more than {error}; send shorter texts or fewer graders",
                    reason=Reason.GRADING_LIMIT_REACHED,
                    metadata={"sample": str(place)},
                ) from error
            except ProcessBroken as error:
                raise Internal(f"samples[{place}] cannot be graded: {error}") from error
        return grades
