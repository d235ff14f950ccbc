"""Answers drawn with the weights that a model has now, for whoever trains on them: tokens and their log-probabilities.

It is the decoding of `luthier.lm.engine` without its sharing: the caller waits, and nobody else is served meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from luthier.lm.decoding import Batch
from luthier.lm.generate import FinishReason, GenerationRequest

_PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one row came to: `logprobs` are empty, or one for each of `token_ids`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(slots=True)
class _Growing:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    request: GenerationRequest,
    *,
    limit_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer a request with the adapter that is active, whatever the request names; one answer for each row.

    Prompts share a batch as long as all its rows, each of the longest prompt and `max_new_tokens`, have at most
    `limit_tokens`; all samples of one prompt always do. A row's random numbers do not depend on the cut. `check` is
    called before each forward pass; it raises to stop.

    Raises:
        FailedPrecondition: OUTPUT_NOT_FINITE.
        Exception: what `check` raised.
    """
    answers: list[Answer] = []
    for start, end in _parts(request, limit_tokens):
        part = replace(
            request,
            prompts=request.prompts[start:end],
            first_row=request.first_row + start * request.num_samples,
        )
        answers += _answers(model, part, check)
    return answers


def _answers(
    model: PreTrainedModel, request: GenerationRequest, check: Callable[[], None]
) -> Iterator[Answer]:
    rows = [_Growing() for _ in range(len(request.prompts) * request.num_samples)]
    check()
    for events in Batch(model, request, None, None).run(_PREFILL_TOKENS):
        for event in events:
            row = rows[event.row]
            row.token_ids += event.token_ids
            row.logprobs += event.logprobs
            row.finish_reason = event.finish_reason
        check()
    for row in rows:
        assert row.finish_reason is not None, "a batch ends when its rows have"
        yield Answer(
            token_ids=tuple(row.token_ids), logprobs=tuple(row.logprobs), finish_reason=row.finish_reason
        )


def _parts(request: GenerationRequest, limit_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut the prompts, in their order, into runs that fit."""
    lengths: Sequence[int] = [len(prompt) for prompt in request.prompts]
    start = longest = 0
    for place, length in enumerate(lengths):
        longest_now = max(longest, length)
        rows = (place + 1 - start) * request.num_samples
        if place > start and rows * (longest_now + request.max_new_tokens) > limit_tokens:
            yield start, place
            start, longest_now = place, length
        longest = longest_now
    yield start, len(lengths)
