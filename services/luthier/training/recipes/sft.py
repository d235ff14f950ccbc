"""Supervised fine-tuning: batches in, metrics and checkpoints out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, Reason
from luthier.kernels.linear_cross_entropy import LossSum
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes.batches import (
    BatchSettings,
    Step,
    iterate_steps,
    pack_first_fit,
    teaching_units,
)
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import CheckpointDue, Course, Event, StepDone
from luthier.training.recipes.engine import Engine, Objective, Sum
from luthier.training.recipes.schedule import Schedule

TIMED_METRICS = frozenset({"tokens_per_second"})
"""Metrics that depend on the clock, and so differ between runs that are otherwise the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        batches: which rows make which step.
        schedule: the learning rate by step.
        checkpoint_interval_steps: steps between checkpoints; one more is taken at the end.
        validation_interval_steps: steps between validations, 0: after each epoch; one more at the end.
    """

    batches: BatchSettings
    schedule: Schedule
    checkpoint_interval_steps: int
    validation_interval_steps: int


def supervised(num_supervised: int) -> Objective[LossSum]:
    """What a step minimises that learns so many tokens: their mean loss."""
    return lambda found, _: {"train_loss": Sum(found.loss_sum, num_supervised)}


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
        FailedPrecondition: LOSS_NOT_FINITE; the message names the step.
        Exception: what `check` raised.
    """
    validation = pack_validation(corpus, settings.batches.micro_batch_tokens)
    for step in iterate_steps(corpus.lengths("TRAIN"), settings.batches, course.step):
        started = time.perf_counter()
        loss_sum = 0.0
        for rows in step.micro_batches:
            check()
            sums = engine.accumulate(corpus.pack(rows), FusedLoss(), supervised(step.num_supervised))
            loss_sum += sums["train_loss"]
        (loss_sum,) = engine.collective.sum_counts([loss_sum])
        train_loss = loss_sum / step.num_supervised
        _require_finite("train_loss", train_loss, step, settings)
        learning_rate = settings.schedule.learning_rate(step.step)
        grad_norm = engine.update(learning_rate)
        _require_finite("grad_norm", grad_norm, step, settings)
        metrics = {
            "train_loss": train_loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_tokens": float(step.num_tokens),
            "num_supervised_tokens": float(step.num_supervised),
            "epoch": step.epochs_done,
            "tokens_per_second": step.num_tokens / (time.perf_counter() - started),
        }
        if _is_validated(step, settings):
            metrics |= validate(engine, corpus, validation, check)
            _require_finite("validation_loss", metrics.get("validation_loss", 0.0), step, settings)
        yield StepDone(step=step.step, metrics=metrics)
        if step.step % settings.checkpoint_interval_steps == 0 or step.step == settings.schedule.num_steps:
            lasting = {name: value for name, value in metrics.items() if name not in TIMED_METRICS}
            reached = Course(step=step.step, epoch=step.epoch, position=step.position, metrics=lasting)
            yield CheckpointDue(course=reached)


def pack_validation(corpus: Corpus, micro_batch_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Return the validation units that have something to learn, as rows by forward pass."""
    return pack_first_fit(teaching_units(corpus.lengths("VALIDATION")), micro_batch_tokens)


def validate(
    engine: Engine,
    corpus: Corpus,
    batches: Sequence[Sequence[int]],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return `validation_loss`, the mean over all supervised tokens of `batches`; nothing without one."""
    loss_sum = count = 0.0
    for batch in batches:
        check()
        found = engine.score(corpus.pack(batch, "VALIDATION"), FusedLoss())
        loss_sum += found.loss_sum.item()
        count += found.num_valid
    loss_sum, count = engine.collective.sum_counts([loss_sum, count])
    return {"validation_loss": loss_sum / count} if count else {}


def _is_validated(step: Step, settings: Settings) -> bool:
    interval = settings.validation_interval_steps
    due = step.step % interval == 0 if interval else step.position + 1 == step.epoch_steps
    return due or step.step == settings.schedule.num_steps


def _require_finite(metric: str, value: float, step: Step, settings: Settings) -> None:
    if not math.isfinite(value):
        raise FailedPrecondition(
            f"{metric} must be finite, got {value} at step {step.step}; a learning rate below "
            f"{settings.schedule.peak:g} or max_grad_norm may help",
            reason=Reason.LOSS_NOT_FINITE,
            metadata={"step": str(step.step), "metric": metric},
        )
