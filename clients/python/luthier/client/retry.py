"""When a call is made again, and after how long."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from luthier.errors import LuthierError, Reason, ResourceExhausted, Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter and an end.

    The wait before retry n (from 0) is `initial_seconds * multiplier ** n`, at most `max_seconds`, times a
    random factor in [1 - jitter, 1 + jitter]; a server that says when to come back is waited for at least
    that long. No retry begins more than `deadline_seconds` after the first attempt (for streams: after the
    last sign of progress). 0 means no retries.
    """

    initial_seconds: float = 0.1
    multiplier: float = 2.0
    max_seconds: float = 5.0
    jitter: float = 0.25
    deadline_seconds: float = 60.0


def is_retryable(error: LuthierError) -> bool:
    """Whether the same call may succeed later: the service is away, or says itself when to come back.

    Not when its disk is full: somebody has to make room, and is told so at once.
    """
    if isinstance(error, ResourceExhausted):
        return error.retry_after_seconds is not None and error.reason != Reason.DISK_FULL
    return isinstance(error, Unavailable)


class Backoff:
    """Counts the failures of one call and says how long to wait, or that it is over.

    `clock` gives monotonic seconds. `progressed` forgets the failures: a stream that delivers is not failing.
    """

    def __init__(self, policy: RetryPolicy, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._failures = 0
        self._began = clock()

    def progressed(self) -> None:
        """Start over: something was achieved."""
        self._failures = 0
        self._began = self._clock()

    def remaining_seconds(self) -> float:
        """Return the time left until no retry may begin. Not negative."""
        return max(0.0, self._began + self._policy.deadline_seconds - self._clock())

    def delay_after(self, error: LuthierError) -> float:
        """Return the seconds to wait before the next attempt; raise `error` when there shall be none."""
        policy = self._policy
        seconds = min(policy.max_seconds, policy.initial_seconds * policy.multiplier**self._failures)
        # Jitter spreads callers, it is not a secret.
        seconds *= random.uniform(1 - policy.jitter, 1 + policy.jitter)
        if error.retry_after_seconds is not None:
            seconds = max(seconds, error.retry_after_seconds)
        if seconds > self.remaining_seconds():
            raise error
        self._failures += 1
        return seconds
