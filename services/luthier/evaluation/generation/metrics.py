"""Prometheus metrics of generation: how long callers wait, how fast answers come, how they end."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from luthier.errors.status import status_to_failure
from luthier.evaluation.generation.rules import is_last
from luthier.runtime.catalogue import work_done
from luthier.runtime.metric import reason_label
from luthier.v1.evaluation_pb2 import FinishReason
from luthier.worker.v1.worker_service_pb2 import PushGenerationRequest

GONE = "GONE"
"""How an answer ended that nobody waited for any more."""
_PREFIX = "FINISH_REASON_"


class GenerationMetrics:
    """Series of all answers."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._waiting = work_done.GENERATIONS_WAITING.gauge(registry)
        self._running = work_done.GENERATIONS_RUNNING.gauge(registry)
        self.ended = work_done.GENERATIONS.counter(registry)
        self.first_token = work_done.FIRST_TOKEN.histogram(registry)
        self.token_seconds = work_done.TOKEN_SECONDS.histogram(registry)
        self.prompt_tokens = work_done.PROMPT_TOKENS.counter(registry)
        self.answer_tokens = work_done.ANSWER_TOKENS.counter(registry)
        for name in FinishReason.keys():  # noqa: SIM118 - no mapping
            if not name.endswith("UNSPECIFIED"):
                self.ended.labels(name.removeprefix(_PREFIX))

    def follow(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Show how many wait and are answered whenever somebody looks: called from any thread."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def begun(self) -> Answer:
        """Return what follows an answer from now on."""
        return Answer(self)


class Answer:
    """One answer on its way to its caller."""

    def __init__(self, metrics: GenerationMetrics) -> None:
        self._metrics = metrics
        self._began = metrics.clock()
        self._first_at: float | None = None
        self._num_first = 0
        self._num_tokens = 0
        self._end = GONE

    def take(self, piece: PushGenerationRequest) -> None:
        """Note a piece of it."""
        metrics, now = self._metrics, self._metrics.clock()
        more = piece.num_generated_tokens - self._num_tokens
        if more > 0:
            metrics.answer_tokens.inc(more)
            self._num_tokens = piece.num_generated_tokens
        if self._first_at is None and self._num_tokens:
            self._first_at, self._num_first = now, self._num_tokens
            metrics.first_token.observe(now - self._began)
        if not is_last(piece):
            return
        if piece.HasField("error"):
            self._end = reason_label(status_to_failure(piece.error).reason)
            return
        self._end = FinishReason.Name(piece.finish_reason).removeprefix(_PREFIX)
        metrics.prompt_tokens.inc(piece.num_prompt_tokens)
        following = self._num_tokens - self._num_first
        if self._first_at is not None and following > 0:
            metrics.token_seconds.observe((now - self._first_at) / following)

    def end(self) -> None:
        """Note that it is over, for its caller too."""
        self._metrics.ended.labels(self._end).inc()
