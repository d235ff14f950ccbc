"""Calls to reward services, which users run: allowed addresses, batches, deadlines, retries.

It stands here and not in `luthier.grading`, which knows no wire. What goes wrong is an error of the samples that it
happened to and never a score; only an address that may not be called is an error of the whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.v1.grader_pb2 import RemoteGrader, Sample
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.v1.reward_service_pb2_grpc import RewardServiceStub
from luthier.work.addresses import AllowedAddresses, split
from luthier.work.limited import Check
from luthier.work.peers import CHANNEL_OPTIONS, Backoff, error_of
from luthier.work.retry import HEAR_SECONDS, answered

TIMEOUT_SECONDS = 30.0
BATCH_SIZE = 64
BATCH_BYTES = 3 << 20
"""Below the 4 MiB that a gRPC server takes unless it is told otherwise."""
_CALLS_AT_ONCE = 4
_MESSAGE_CHARACTERS = 1000
# No proxy and no resolver by scheme: an address means host and port, whatever the environment or its first word says.
_OPTIONS = [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardError:
    """Why a sample has no score: what a program can switch on, and words."""

    reason: Reason
    message: str


class RewardAddresses:
    """The addresses that may be called. Raises InvalidArgument for an entry that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._allowed = AllowedAddresses("LUTHIER_REWARD_ADDRESSES", entries)

    def require(self, address: str, field: str) -> None:
        """Raise InvalidArgument ADDRESS_NOT_ALLOWED, naming the field, unless an address may be called."""
        found = split(address)
        if found is not None and found[1] is not None and self._allowed.allows(found[0], found[1]):
            return
        raise InvalidArgument.of_fields(
            FieldViolation(
                field=field,
                description=f"must be {self._allowed.said()}, got {address!r}",
                reason=Reason.ADDRESS_NOT_ALLOWED,
            )
        )


def scored(
    grader: RemoteGrader,
    samples: Sequence[Sample],
    allowed: RewardAddresses,
    check: Check = lambda: None,
    most_errors: int | None = None,
) -> list[float | RewardError]:
    """Return what a reward service says of each sample, in their order; scores are finite.

    A batch has `grader.timeout_seconds`, calls that are repeated after UNAVAILABLE included; a few batches run at once.
    Once `most_errors` samples have no score it is asked no more: the others have none either. `check` is called while
    it waits, from several threads.

    Raises:
        InvalidArgument: ADDRESS_NOT_ALLOWED.
        LuthierError: what `check` raised.
    """
    allowed.require(grader.address, "remote.address")
    together = list(batches(samples, grader.max_batch_size or BATCH_SIZE))
    with (
        grpc.insecure_channel(f"dns:///{grader.address}", options=_OPTIONS) as channel,
        ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="rewards") as threads,
    ):
        asker = _Asker(
            stub=RewardServiceStub(channel),
            address=grader.address,
            timeout_seconds=grader.timeout_seconds or TIMEOUT_SECONDS,
            check=check,
            most_errors=math.inf if most_errors is None else most_errors,
        )
        return [one for batch in threads.map(asker.scores, together) for one in batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asker:
    stub: RewardServiceStub
    address: str
    timeout_seconds: float
    check: Check
    most_errors: float
    errors: list[RewardError] = field(default_factory=list)

    def scores(self, batch: Sequence[Sample]) -> list[float | RewardError]:
        """Score one batch, unless too many samples have no score yet."""
        if len(self.errors) < self.most_errors:
            found = self._answers(batch)
            self.errors.extend(one for one in found if isinstance(one, RewardError))
            return found
        last, count = self.errors[-1], len(self.errors)
        said = f"it was asked no more after {count} samples without a score, the last of them: {last.message}"
        return [self._error(last.reason, said)] * len(batch)

    def _answers(self, batch: Sequence[Sample]) -> list[float | RewardError]:
        try:
            response = self._response(ScoreRequest(samples=batch))
        except grpc.RpcError as error:
            return [self._failure(error)] * len(batch)
        if len(response.scores) != len(batch):
            said = f"it answered {len(response.scores)} scores for {len(batch)} samples"
            return [self._error(Reason.REWARD_SERVICE_INVALID, said)] * len(batch)
        return [self._score(one) for one in response.scores]

    def _response(self, request: ScoreRequest) -> ScoreResponse:
        deadline = time.monotonic() + self.timeout_seconds
        backoff = Backoff(0.1, 2.0)
        while True:
            left = deadline - time.monotonic()
            try:
                return answered(self.stub.Score.future(request, timeout=max(left, 0.001)), self.check)
            except grpc.RpcError as error:
                delay_seconds = backoff.after(error_of(error))
                is_over = time.monotonic() + delay_seconds > deadline
                if _code(error) is not grpc.StatusCode.UNAVAILABLE or is_over:
                    raise
            self._sleep(delay_seconds)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, HEAR_SECONDS))

    def _score(self, one: SampleScore) -> float | RewardError:
        outcome = one.WhichOneof("outcome")
        if outcome == "error":
            said = one.error[:_MESSAGE_CHARACTERS] or "it gave no reason"
            return self._error(Reason.REWARD_FAILED, f"it could not score this sample: {said}")
        if outcome is None:
            return self._error(Reason.REWARD_SERVICE_INVALID, "it answered neither a score nor an error")
        if not math.isfinite(one.score):
            return self._error(Reason.SCORE_NOT_FINITE, f"its score must be finite, got {one.score}")
        return one.score

    def _failure(self, error: grpc.RpcError) -> RewardError:
        code, said = _code(error), error_of(error).message[:_MESSAGE_CHARACTERS]
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            what = f"no answer within {self.timeout_seconds:g} s: {said}"
            return self._error(Reason.REWARD_SERVICE_UNAVAILABLE, what)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            what = f"it does not serve luthier.v1.RewardService: {said}"
            return self._error(Reason.REWARD_SERVICE_INVALID, what)
        return self._error(Reason.REWARD_FAILED, f"it refused the batch with {code.name}: {said}")

    def _error(self, reason: Reason, what: str) -> RewardError:
        return RewardError(reason=reason, message=f"reward service {self.address}: {what}")


def batches(samples: Sequence[Sample], most: int, most_bytes: int = BATCH_BYTES) -> Iterator[list[Sample]]:
    """Cut samples into batches of `most` and of `most_bytes` at most, or of one that has more."""
    batch: list[Sample] = []
    size_bytes = 0
    for sample in samples:
        one_bytes = sample.ByteSize()
        if batch and (len(batch) == most or size_bytes + one_bytes > most_bytes):
            yield batch
            batch, size_bytes = [], 0
        batch.append(sample)
        size_bytes += one_bytes
    if batch:
        yield batch


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    call: Any = error  # what a call raises is a call too
    code: grpc.StatusCode = call.code()
    return code
