"""Graders tried on given answers: remote ones asked, all else calculated in limited processes."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from luthier.errors import Cancelled, Failure, Internal, InvalidArgument, Reason, ResourceExhausted
from luthier.errors.status import failure_to_status
from luthier.evaluation.grading import rules
from luthier.grading.asked import remote_addresses, remote_graders
from luthier.grading.outcomes import CODES
from luthier.runtime.names import require_project
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest
from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade
from luthier.work.limited import Check, LimitReached, ProcessBroken
from luthier.work.limited_child import Limits
from luthier.work.limited_pool import LimitedPool
from luthier.work.rewards import RewardAddresses, RewardError, scored

T = TypeVar("T")
CHILD = "luthier.evaluation.grading.child"
SAMPLE_LIMITS = Limits(cpu_seconds=10, memory_bytes=1 << 30, wall_seconds=40.0)
"""What one sample may take. Sixteen similarities of the longest texts take some 7 s of processor time."""
MAX_GRADINGS = 8
"""Calls that grade at once; each waits in a thread of its own."""
_PROCESSES = 2
_WAIT_SECONDS = 20.0
_SAMPLES_AN_ANSWER = 16
_RETRY_SECONDS = 2.0
_Rewards = Mapping[str, Sequence[float | RewardError]]


class GradingService:
    """Grades samples. Nothing is stored. Memory: what one request holds, and the processes."""

    def __init__(self, allowed: RewardAddresses, projects: Container[str]) -> None:
        self._allowed = allowed
        self._projects = projects
        self._pool = LimitedPool(CHILD, SAMPLE_LIMITS, size=_PROCESSES, wait_seconds=_WAIT_SECONDS)
        # Threads of its own: they wait for processes and for reward services, and the event loop's are for short work.
        self._threads = ThreadPoolExecutor(MAX_GRADINGS, thread_name_prefix="grading")
        self._running = 0

    async def grade(self, request: GradeSamplesRequest) -> AsyncIterator[list[SampleGrade]]:
        """Yield the grades of the next samples, until there is one for each.

        Raises:
            InvalidArgument: a field is not valid, ADDRESS_NOT_ALLOWED; GRADING_LIMIT_REACHED, a sample takes too much.
            PermissionDenied: there is no such project.
            ResourceExhausted: OVERLOADED, too many others grade.
            Unavailable: the service stops.
        """
        project = require_project(request.parent, self._projects)
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
        encoded = _encoded(request.grader)
        grades = []
        for place in some:
            asked = _asked(
                encoded, request.samples[place], {path: found[place] for path, found in rewards.items()}
            )
            try:
                grades.append(_grade(self._pool.call(project, asked, check=check)))
            except LimitReached as error:
                raise InvalidArgument(
                    f"samples[{place}]: grading it takes more than {error}; send shorter texts or fewer graders",
                    reason=Reason.GRADING_LIMIT_REACHED,
                    metadata={"sample": str(place)},
                ) from error
            except ProcessBroken as error:
                raise Internal(f"samples[{place}] cannot be graded: {error}") from error
        return grades


def _encoded(grader: Grader) -> str:
    # The order of a map's entries is not the same for ever, and the process knows graders by their text.
    return base64.b64encode(grader.SerializeToString(deterministic=True)).decode()


def _asked(encoded: str, sample: Sample, rewards: Mapping[str, float | RewardError]) -> dict[str, Any]:
    remote = {
        path: {"reason": one.reason, "message": one.message}
        if isinstance(one, RewardError)
        else {"score": one}
        for path, one in rewards.items()
    }
    return {
        "grader": encoded,
        "item_json": sample.item_json,
        "output_text": sample.output_text,
        "remote": remote,
    }


def _grade(answer: Mapping[str, Any]) -> SampleGrade:
    grade = SampleGrade(part_scores=answer["parts"])
    if "score" in answer:
        grade.score = answer["score"]
    else:
        reason = answer["reason"]
        failure = Failure(code=CODES[Reason(reason)], reason=reason, message=answer["message"])
        grade.error.CopyFrom(failure_to_status(failure))
    return grade
