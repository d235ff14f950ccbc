"""Supervised fine-tuning: batches in, metrics and checkpoints out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from luthier.lm.readouts import FusedLoss, FusedLossAndHits
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course, Event
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Loop, Settings, measured, packed
from luthier.training.recipes.objectives import supervised, supervised_with_hits
from luthier.training.recipes.units import SINGLE, require_units


def train(
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    course: Course,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Event]:
    """Make all steps after those of `course`, yielding after each.

    A step sums the loss of its micro-batches and divides by the supervised tokens of the whole step, so that
    the gradient does not depend on how the step is cut. A caller stops by not asking for more, or inside a
    step by a `check` that raises: it is called before every forward pass. The engine is of no use then.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE, the message names the step; ROWS_NOT_OF_METHOD, METRIC_NOT_MEASURED.
        Exception: what `check` raised.
    """
    for split in ("TRAIN", "VALIDATION"):
        require_units(corpus.lengths(split), corpus.roles(split), SINGLE, settings.mixture)
    loop = Loop(engine, corpus, settings, course, check)
    for step in loop.steps():
        objective = supervised(step.num_supervised)
        for batch in loop.batches(step):
            loop.add(batch, engine.accumulate(batch, FusedLoss(), objective))
        metrics = loop.update(step, {"train_loss": step.num_supervised})
        metrics |= loop.validate(step, lambda batches: validate(engine, corpus, batches, check))
        yield from loop.finish(step, metrics)


def validate(
    engine: Engine,
    corpus: Corpus,
    batches: Sequence[Sequence[int]],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return `validation_loss` and `validation_token_accuracy` over all supervised tokens; nothing without one.

    `batches` are validation rows by forward pass.
    """
    learnt = [unit for rows in batches for unit in corpus.with_role(rows, "", "VALIDATION")]
    num_tokens = sum(unit.num_supervised for unit in learnt)
    objective = supervised_with_hits(num_tokens)
    counts = {"train_loss": num_tokens, "token_accuracy": num_tokens}
    return measured(
        engine, packed(corpus, batches, engine.collective, check), FusedLossAndHits(), objective, counts
    )
