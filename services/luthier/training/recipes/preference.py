"""Preference tuning on pairs (DPO, IPO, ORPO, SimPO): the chosen answer becomes likelier than the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.corpus import Corpus, Split
from luthier.training.recipes.course import Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Loop, Settings, measured, packed
from luthier.training.recipes.objectives import PairLoss, needs_reference, pair_counts, pair_objective
from luthier.training.recipes.reference import with_reference
from luthier.training.recipes.units import CHOSEN, PAIR, require_units


def train(
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    loss: PairLoss,
    course: Course,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Make all steps after those of `course`, yielding after each.

    Where the loss has a reference, it is the model as the weights found it (`Weights.reference`), or what
    `reference.score_reference` gave the corpus.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE, ROWS_NOT_OF_METHOD, NO_SUPERVISED_TOKENS, METRIC_NOT_MEASURED.
        Exception: what `check` raised.
    """
    for split in ("TRAIN", "VALIDATION"):
        require_units(corpus.lengths(split), corpus.roles(split), PAIR, settings.mixture)
    loop = Loop(engine, corpus, settings, course, check)
    for step in loop.steps():
        counts = _counts(corpus, step.micro_batches, "TRAIN")
        objective = pair_objective(loss, counts)
        for batch in _compared(engine, loss, loop.batches(step)):
            loop.add(batch, engine.accumulate(batch, TokenLogprobs(), objective))
        metrics = loop.update(step, counts)
        metrics |= loop.validate(step, lambda batches: validate(engine, corpus, loss, batches, check))
        yield from loop.finish(step, metrics)


def validate(
    engine: Engine,
    corpus: Corpus,
    loss: PairLoss,
    batches: Sequence[Sequence[int]],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return `validation_loss`, rewards of both sides, their margin and accuracy; nothing without a pair.

    `batches` are validation rows by forward pass.
    """
    counts = _counts(corpus, batches, "VALIDATION")
    if not counts["train_loss"]:
        return {}
    compared = _compared(engine, loss, packed(corpus, batches, engine.collective, check))
    return measured(engine, compared, TokenLogprobs(), pair_objective(loss, counts), counts)


def _counts(corpus: Corpus, batches: Sequence[Sequence[int]], split: Split) -> dict[str, float]:
    chosen = [unit for rows in batches for unit in corpus.with_role(rows, CHOSEN, split)]
    return pair_counts(len(chosen), sum(unit.num_supervised for unit in chosen))


def _compared(engine: Engine, loss: PairLoss, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """Yield batches with the reference's log-probabilities, where the loss has a reference."""
    for batch in batches:
        yield with_reference(engine, batch) if needs_reference(loss) else batch
