"""Reward models: a value at the end of each answer, higher for the chosen one of a pair (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from luthier.lm.readouts import SequenceValues
from luthier.training.recipes.corpus import Corpus, Split
from luthier.training.recipes.course import Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Loop, Settings, measured, packed
from luthier.training.recipes.objectives import PairwiseReward, reward_counts, reward_objective
from luthier.training.recipes.units import CHOSEN, PAIR, require_units
from luthier.training.recipes.weights import SCORE


def train(
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    loss: PairwiseReward,
    course: Course,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Make all steps after those of `course`, yielding after each. The engine's weights have a `score` head.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE, ROWS_NOT_OF_METHOD, NO_SUPERVISED_TOKENS, METRIC_NOT_MEASURED.
        Exception: what `check` raised.
    """
    for split in ("TRAIN", "VALIDATION"):
        require_units(corpus.lengths(split), corpus.roles(split), PAIR, settings.mixture)
    loop = Loop(engine, corpus, settings, course, check)
    values = SequenceValues(head=engine.weights.parameters[SCORE])
    for step in loop.steps():
        counts = _counts(corpus, step.micro_batches, "TRAIN")
        objective = reward_objective(loss, counts)
        for batch in loop.batches(step):
            loop.add(batch, engine.accumulate(batch, values, objective))
        metrics = loop.update(step, counts)
        metrics |= loop.validate(step, lambda batches: validate(engine, corpus, loss, batches, check))
        yield from loop.finish(step, metrics)


def validate(
    engine: Engine,
    corpus: Corpus,
    loss: PairwiseReward,
    batches: Sequence[Sequence[int]],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return `validation_loss`, the mean values of both sides, their margin and accuracy; nothing without a pair.

    `batches` are validation rows by forward pass.
    """
    counts = _counts(corpus, batches, "VALIDATION")
    values = SequenceValues(head=engine.weights.parameters[SCORE])
    return measured(
        engine,
        packed(corpus, batches, engine.collective, check),
        values,
        reward_objective(loss, counts),
        counts,
    )


def _counts(corpus: Corpus, batches: Sequence[Sequence[int]], split: Split) -> dict[str, float]:
    return reward_counts(sum(len(corpus.with_role(rows, CHOSEN, split)) for rows in batches))
