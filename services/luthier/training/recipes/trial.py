"""A pass whose gradient is forgotten: what a step takes of memory is known before the first one."""

from __future__ import annotations

from torch import Tensor

from luthier.kernels.linear_cross_entropy import LossSum
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.readouts import FusedLoss, SequenceValues, TokenLogprobs, TokenScores
from luthier.training.recipes.batches import iterate_steps
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.engine import Engine, Sum
from luthier.training.recipes.footprint import Trained
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.weights import SCORE


def try_pass(engine: Engine, batch: PackedBatch, trained: Trained) -> None:
    """Make a pass and its gradient, reading what the run reads, and forget it: the engine is as it was before.

    Raises RuntimeError, or MemoryError, where memory does not suffice.
    """
    try:
        match trained.read:
            case "LOSS":
                engine.accumulate(batch, FusedLoss(), _loss)
            case "VALUES":
                head = engine.weights.parameters[SCORE]
                engine.accumulate(batch, SequenceValues(head=head), _values)
            case "LOGPROBS":
                engine.accumulate(batch, TokenLogprobs(), _scores)
            case "LOGPROBS_AND_ENTROPIES":
                engine.accumulate(batch, TokenLogprobs(want_entropy=True, is_wide=True), _scores)
    finally:
        engine.forget()


def largest_batch(corpus: Corpus, settings: Settings, num_samples: int, max_new_tokens: int) -> PackedBatch:
    """Return the forward pass with the most tokens of all steps, the first of several.

    With `num_samples` rows are prompts, and it has as many answers to the longest ones as fit, each of
    `max_new_tokens`.
    """
    lengths = corpus.lengths("TRAIN")
    tokens = dict(zip(lengths.rows, lengths.num_tokens, strict=True))
    steps = iterate_steps(lengths, settings.batches, mixture=settings.mixture)
    if num_samples:
        rows = max(
            ([row for batch in step.micro_batches for row in batch] for step in steps),
            key=lambda some: sum(tokens[row] for row in some),
        )
        return _answered(corpus, rows, settings.batches.micro_batch_tokens, num_samples, max_new_tokens)
    passes = (batch for step in steps for batch in step.micro_batches)
    return corpus.pack(max(passes, key=lambda some: sum(tokens[row] for row in some)))


def _answered(
    corpus: Corpus, rows: list[int], limit_tokens: int, num_samples: int, max_new_tokens: int
) -> PackedBatch:
    prompts = sorted(((row, corpus.tokens(row)) for row in rows), key=lambda one: len(one[1]), reverse=True)
    chosen: list[tuple[int, ...]] = []
    answered: list[int] = []
    room = limit_tokens
    for row, prompt in (one for one in prompts for _ in range(num_samples)):
        length = len(prompt) + max_new_tokens
        if length <= room:
            room -= length
            chosen.append((*prompt, *(prompt[-1:] * max_new_tokens)))
            answered.append(row)
    learnt = [[0.0] * (len(one) - max_new_tokens) + [1.0] * max_new_tokens for one in chosen]
    return pack(chosen, {WEIGHT: learnt}, answered)


def _loss(found: LossSum, _: PackedBatch) -> dict[str, Sum]:
    return {"trial": Sum(found.loss_sum, 1.0)}


def _values(found: Tensor, _: PackedBatch) -> dict[str, Sum]:
    return {"trial": Sum(found.sum(), 1.0)}


def _scores(found: TokenScores, _: PackedBatch) -> dict[str, Sum]:
    entropy = 0.0 if found.entropy is None else found.entropy.sum()
    return {"trial": Sum(found.logprob.sum() + entropy, 1.0)}
