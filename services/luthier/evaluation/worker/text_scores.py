"""Given texts as tokens, cut to what a model reads, and how likely it finds them.

Tokens are cut as lm-evaluation-harness cuts them (0.4, `TemplateLM.loglikelihood` and `get_rolling_token_windows`), so
that its tasks have the numbers here that they have with its own backends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.worker.asking import Asker
from luthier.evaluation.worker.engine import EngineClient
from luthier.evaluation.worker.order import Measured
from luthier.evaluation.worker.turns import turns
from luthier.lm.score import SequenceScore
from luthier.text.rendering import RenderingError
from luthier.v1.text_score_pb2 import TextScore, TextToScore
from luthier.work.limited import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens of which the last `num_wanted` are scored; `num_cut` before them were left out."""

    ids: tuple[int, ...]
    num_wanted: int
    num_cut: int = 0


def scored_texts(
    asker: Asker,
    engine: EngineClient,
    adapter: str | None,
    texts: Sequence[TextToScore],
    max_tokens: int,
    check: Check,
) -> list[TextScore]:
    """Return how likely texts are, in their order; `max_tokens` is what the model reads at most, 0: all.

    Raises:
        InvalidArgument: a continuation has no token, or more than the model reads.
        FailedPrecondition: MODEL_INVALID, a text has no finite likelihood, or the tokenizer fails; WRONG_STATE, there
            is no token to stand before a text without a context.
        LuthierError: as the engine.
    """
    reader = _Reader(asker, max_tokens)
    windows = [list(reader.windows(one, f"texts[{index}]")) for index, one in enumerate(texts)]
    flat = [window for found in windows for window in found]
    scores: list[SequenceScore] = []
    for part in turns(flat, lambda window: len(window.ids)):
        check()
        measured = Measured(
            adapter=adapter,
            sequences=[window.ids for window in part],
            masks=[_mask(window) for window in part],
            likeliest=True,
        )
        scores += engine.measure(measured, check)
    left = iter(scores)
    return [_joined(found, [next(left) for _ in found], index) for index, found in enumerate(windows)]


class _Reader:
    """Makes tokens of texts."""

    def __init__(self, asker: Asker, max_tokens: int) -> None:
        self._asker = asker
        self._max_tokens = max_tokens
        self._start: int | None = None
        self._prefix: tuple[int, ...] | None = None

    def windows(self, text: TextToScore, field: str) -> Iterator[Window]:
        """Yield what a text is scored by: one window unless it is rolling."""
        if text.rolling:
            yield from self._rolling(self._required(self._raw(text.continuation), field), field)
            return
        if text.context:
            before = self._raw(text.context)
            wanted = self._raw(text.context + text.continuation)[len(before) :]
        else:
            if self._prefix is None:
                self._prefix = self._raw("")
            before = (self._start_token(field),)
            wanted = self._raw(text.continuation)[len(self._prefix) :]
            if wanted[:1] == before:
                wanted = wanted[1:]
        yield self._window(before, self._required(wanted, field), field)

    def _window(self, before: tuple[int, ...], wanted: tuple[int, ...], field: str) -> Window:
        most = self._max_tokens
        if most and len(wanted) > most:
            raise _refused(
                f"{field}.continuation",
                f"must have at most {most} tokens, got {len(wanted)}; rolling has no limit",
            )
        # The last token is only foretold, never read.
        num_cut = max(0, len(before) + len(wanted) - 1 - most) if most else 0
        return Window(ids=(*before[num_cut:], *wanted), num_wanted=len(wanted), num_cut=num_cut)

    def _rolling(self, ids: tuple[int, ...], field: str) -> Iterator[Window]:
        most = self._max_tokens or len(ids)
        first = ids[:most]
        yield Window(ids=(self._start_token(field), *first), num_wanted=len(first))
        for done in range(most, len(ids), most):
            end = min(done + most, len(ids))
            yield Window(ids=ids[end - most - 1 : end], num_wanted=end - done)

    def _raw(self, text: str) -> tuple[int, ...]:
        try:
            return self._asker.raw(text)
        except RenderingError as error:
            raise FailedPrecondition(str(error), reason=error.reason) from error

    def _start_token(self, field: str) -> int:
        if self._start is None:
            self._start = self._asker.start_token()
        if self._start is None:
            raise FailedPrecondition(
                f"{field}.context must be set: the model has no token that begins or ends texts, which could stand "
                "before this one",
                reason=Reason.WRONG_STATE,
            )
        return self._start

    @staticmethod
    def _required(wanted: tuple[int, ...], field: str) -> tuple[int, ...]:
        if not wanted:
            raise _refused(
                f"{field}.continuation", "must have a token of its own behind the context, it has none"
            )
        return wanted


def _mask(window: Window) -> tuple[bool, ...]:
    num_before = len(window.ids) - window.num_wanted
    return (*(False for _ in range(num_before)), *(True for _ in range(window.num_wanted)))


def _joined(windows: Sequence[Window], scores: Sequence[SequenceScore], index: int) -> TextScore:
    log_probability = math.fsum(score.logprob for score in scores)
    if not math.isfinite(log_probability):
        raise FailedPrecondition(
            f"texts[{index}] must have a finite log-probability, got {log_probability}; the model's weights or its "
            "adapter are broken",
            reason=Reason.MODEL_INVALID,
        )
    return TextScore(
        log_probability=log_probability,
        num_tokens=sum(score.num_tokens for score in scores),
        is_greedy=all(score.is_greedy for score in scores),
        num_cut_tokens=sum(window.num_cut for window in windows),
    )


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description))
