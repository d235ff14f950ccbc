"""What every recipe's loop shares: which batches come, what a step's sums come to, and what is due after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import Readout, ReadT
from luthier.training.recipes.batches import (
    BatchSettings,
    Step,
    Unit,
    iterate_steps,
    pack_first_fit,
    shares_reached,
    teaching_units,
)
from luthier.training.recipes.collective import Collective, dealt
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import (
    TIMED_METRICS,
    CheckpointDue,
    Course,
    Event,
    Selection,
    StepDone,
)
from luthier.training.recipes.engine import Engine, Objective
from luthier.training.recipes.mixture import Mixture, rows_listed, rows_named
from luthier.training.recipes.position import NAMED_ROWS
from luthier.training.recipes.schedule import Schedule

TRAIN_LOSS = "train_loss"
VALIDATION_LOSS = "validation_loss"
Batches = Sequence[Sequence[int]]
"""Rows by forward pass."""
Measure = Callable[[Batches], Mapping[str, float]]
"""What a method measures on validation rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train, whatever the method.

    Attributes:
        batches: which rows make which step.
        schedule: the learning rate by step.
        checkpoint_interval_steps: steps between checkpoints; one more is taken at the end.
        validation_interval_steps: steps between validations, 0: after each epoch; one more at the end.
        selection: which validation is the best, and when to end early; None: neither.
        mixture: of which renderings the rows are; None: of one.
    """

    batches: BatchSettings
    schedule: Schedule
    checkpoint_interval_steps: int
    validation_interval_steps: int
    selection: Selection | None = None
    mixture: Mixture | None = None


def settings_record(settings: Settings, method: Any = None) -> dict[str, Any]:
    """Return what a checkpoint says of a run's settings, and of its method's where it has some (a dataclass).

    What was not there when runs began that may go on today is left out where it has no effect.
    """
    record = asdict(settings)
    if settings.selection is None:
        del record["selection"]
    if settings.mixture is None:
        del record["mixture"]
    if settings.schedule.decay_steps == 0:
        del record["schedule"]["decay_steps"]
    if method is not None:
        record["method"] = {"name": type(method).__name__, **asdict(method)}
    return record


class Tally:
    """Totals of sums over the batches of a step or of a validation."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self.broken_rows: tuple[int, ...] = ()
        """Rows of the first batch that has a total that is not finite."""

    def add(self, batch: PackedBatch, totals: Mapping[str, float]) -> None:
        """Add what a batch came to."""
        for name, total in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + total
        if not self.broken_rows and not all(map(math.isfinite, totals.values())):
            self.broken_rows = batch.rows

    def means(self, counts: Mapping[str, float], collective: Collective) -> dict[str, float]:
        """Return each total over all ranks divided by its count; what has a count of 0 is left out.

        `counts` are those of all ranks. One that had no batch gives nothing to the totals.
        """
        counted = [name for name, count in counts.items() if count]
        own = self._totals or dict.fromkeys(counted, 0.0)
        totals = collective.sum_counts([own[name] for name in counted])
        return {name: total / counts[name] for name, total in zip(counted, totals, strict=True)}


class Loop:
    """The steps of one run on one engine, from where its course stands.

    A recipe takes each step, adds up what its batches come to, updates, and tells what is done and due:

        for step in loop.steps():
            for batch in loop.batches(step):
                loop.add(batch, engine.accumulate(batch, ...))
            metrics = loop.update(step, counts)
            metrics |= loop.validate(step, lambda batches: ...)
            yield from loop.finish(step, metrics)

    Of several ranks each takes some of a step's batches, and has the same weights, metrics and course after it.
    `check` is called before every forward pass; it raises to stop a run inside a step. The engine is of no use then.
    `validations` are the validation rows that teach, by forward pass, of each rendering; `course` is how far the run
    has come.
    """

    def __init__(
        self,
        engine: Engine,
        corpus: Corpus,
        settings: Settings,
        course: Course,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._corpus = corpus
        self._settings = settings
        self.course = course
        self._check = check
        self._tally = Tally()
        self._started = 0.0
        self.validations = pack_validations(corpus, settings)
        if settings.selection is not None and not any(self.validations):
            raise FailedPrecondition(
                f"a run that is judged by {settings.selection.metric} must have validation rows, got none",
                reason=Reason.METRIC_NOT_MEASURED,
                metadata={"metric": settings.selection.metric},
            )

    def steps(self) -> Iterator[Step]:
        """Yield the steps that are still to be made, until the last one or until the run has ended early."""
        lengths = self._corpus.lengths("TRAIN")
        done = self.course.step
        for step in iterate_steps(lengths, self._settings.batches, done, self._settings.mixture):
            if self.course.is_stopped:
                return
            self._engine.clock.enter("data")
            self._started = time.perf_counter()
            self._tally = Tally()
            self._engine.mark.begin(step.step, _rows(step))
            yield step

    def batches(self, step: Step) -> Iterator[PackedBatch]:
        """Yield the micro-batches of a step that this rank takes."""
        clock = self._engine.clock
        for rows, counts in dealt(step.micro_batches, self._engine.collective):
            clock.enter("data")
            self._check()
            batch = replace(self._corpus.pack(rows), counts=counts)
            clock.enter("compute")
            yield batch

    def add(self, batch: PackedBatch, totals: Mapping[str, float]) -> None:
        """Take in what a micro-batch of the step came to."""
        self._tally.add(batch, totals)

    def update(self, step: Step, counts: Mapping[str, float]) -> dict[str, float]:
        """Change the weights by the step's gradient; returns the step's metrics: the mean of each sum that has a count.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE; the message names the step and the rows.
        """
        self._engine.clock.enter("compute")  # also where a rank had no batch: it waits for those that had
        means = self._tally.means(counts, self._engine.collective)
        rows = _rows(step)
        if not all(map(math.isfinite, means.values())):
            broken = self._engine.collective.gathered(self._tally.broken_rows)
            for name, value in means.items():
                self.require_finite(name, value, step, next(filter(None, broken), rows))
        learning_rate = self._settings.schedule.learning_rate(step.step)
        grad_norm = self._engine.update(learning_rate)
        self.require_finite("grad_norm", grad_norm, step, rows)
        return {
            **means,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            **self._told(step),
        }

    def skip(self, step: Step, *, is_cut: bool) -> dict[str, float]:
        """Leave the weights as they are, as the step has nothing to learn from; returns its metrics.

        `is_cut`: there were different rewards, but of answers that were cut.
        """
        course = self.course
        self.course = replace(
            course, idle_steps=course.idle_steps + 1, cut_steps=course.cut_steps + int(is_cut)
        )
        return self._told(step)

    def fail(self, num_answers: int) -> None:
        """Note that so many answers of the step got no score."""
        self.course = replace(self.course, grader_errors=self.course.grader_errors + num_answers)

    def _told(self, step: Step) -> dict[str, float]:
        return {
            "num_tokens": float(step.num_tokens),
            "num_supervised_tokens": float(step.num_supervised),
            "epoch": step.epochs_done,
            "tokens_per_second": step.num_tokens / (time.perf_counter() - self._started),
            **self._shares(step),
        }

    def _shares(self, step: Step) -> dict[str, float]:
        """Return what share of a step is of each rendering that is mixed in."""
        mixture = self._settings.mixture
        if mixture is None:
            return {}
        reached = shares_reached(step.drawn, mixture)
        return {f"share_{number}": share for number, share in enumerate(reached) if number}

    def is_validated(self, step: Step) -> bool:
        """Whether a validation is due after a step."""
        interval = self._settings.validation_interval_steps
        due = step.step % interval == 0 if interval else step.position + 1 == step.epoch_steps
        return due or step.step == self._settings.schedule.num_steps

    def validate(self, step: Step, measure: Measure) -> dict[str, float]:
        """Return what `measure` finds where a validation is due after a step, of each rendering by itself.

        Metrics of the rendering that is mixed in as number k end in `_k`.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE; the message names the step and the rows.
        """
        found: dict[str, float] = {}
        for number, batches in enumerate(self.validations if self.is_validated(step) else ()):
            rows = [row for batch in batches for row in batch]
            with self._engine.clock.within("validation"):
                measured_values = measure(batches)
            for metric, value in measured_values.items():
                name = f"{metric}_{number}" if number else metric
                self.require_finite(name, value, step, rows)
                found[name] = value
        return found

    def finish(self, step: Step, metrics: Mapping[str, float]) -> Iterator[Event]:
        """Tell that a step is done, and that a checkpoint is due where it is.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE, METRIC_NOT_MEASURED where a validation lacks the metric that the run is
                judged by.
            Unavailable: RANKS_DIVERGED, before a checkpoint.
        """
        rows = _rows(step)
        for name, value in metrics.items():
            self.require_finite(name, value, step, rows)
        lasting = {name: value for name, value in metrics.items() if name not in TIMED_METRICS}
        self.course = replace(
            self.course, step=step.step, epoch=step.epoch, position=step.position, metrics=lasting
        )
        selection = self._settings.selection
        if selection is not None and self.is_validated(step):
            self.course = selection.judged(self.course, _value(metrics, selection.metric))
        yield StepDone(step=step.step, metrics=metrics, course=self.course)
        is_last = self.course.is_stopped or step.step == self._settings.schedule.num_steps
        is_best = self.course.best_step == step.step
        if is_last or is_best or step.step % self._settings.checkpoint_interval_steps == 0:
            self._engine.require_same_weights()
            yield CheckpointDue(course=self.course)

    def require_finite(self, metric: str, value: float, step: Step, rows: Sequence[int]) -> None:
        """Check a metric that some rows gave.

        Raises:
            FailedPrecondition: LOSS_NOT_FINITE; the message names the step and the first 20 rows.
        """
        if math.isfinite(value):
            return
        rows = tuple(dict.fromkeys(rows))  # of answers that were drawn several are of one
        named = rows_named(rows[:NAMED_ROWS], self._settings.mixture)
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        raise FailedPrecondition(
            f"{metric} must be finite, got {value} at step {step.step}, whose rows are {named}{more}; a learning rate "
            f"below {self._settings.schedule.peak:g} or max_grad_norm may help",
            reason=Reason.LOSS_NOT_FINITE,
            metadata={
                "step": str(step.step),
                "metric": metric,
                **rows_listed(rows[:NAMED_ROWS], self._settings.mixture),
                "num_rows": str(len(rows)),
            },
        )


def _rows(step: Step) -> tuple[int, ...]:
    return tuple(row for batch in step.micro_batches for row in batch)


def pack_validation(corpus: Corpus, micro_batch_tokens: int) -> Batches:
    """Return the validation units that have something to learn, as rows by forward pass."""
    return pack_first_fit(teaching_units(corpus.lengths("VALIDATION")), micro_batch_tokens)


def pack_validations(corpus: Corpus, settings: Settings) -> tuple[Batches, ...]:
    """Return the same of each rendering of a run, so that no forward pass has rows of two."""
    limit, mixture = settings.batches.micro_batch_tokens, settings.mixture
    if mixture is None:
        return (pack_validation(corpus, limit),)
    parts: list[list[Unit]] = [[] for _ in mixture.names]
    for unit in teaching_units(corpus.lengths("VALIDATION")):
        parts[mixture.source(unit.number)].append(unit)
    return tuple(pack_first_fit(part, limit) for part in parts)


def packed(
    corpus: Corpus,
    batches: Sequence[Sequence[int]],
    collective: Collective,
    check: Callable[[], None] = lambda: None,
) -> Iterator[PackedBatch]:
    """Yield those batches of validation rows that a rank takes; `check` is called before each."""
    for rows, counts in dealt(batches, collective):
        check()
        yield replace(corpus.pack(rows, "VALIDATION"), counts=counts)


def measured(
    engine: Engine,
    batches: Iterable[PackedBatch],
    readout: Readout[ReadT],
    objective: Objective[ReadT],
    counts: Mapping[str, float],
) -> dict[str, float]:
    """Return the means of an objective's sums over all batches of a validation: `validation_loss`, `validation_<name>`.

    `batches` are those that this rank takes. `counts`, of all of them, divide the sums; what has a count of 0 is not
    measured.
    """
    tally = Tally()
    for batch in batches:
        tally.add(batch, engine.measure(batch, readout, objective))
    means = tally.means(counts, engine.collective)
    return {
        VALIDATION_LOSS if name == TRAIN_LOSS else f"validation_{name}": value
        for name, value in means.items()
    }


def _value(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise FailedPrecondition(
            f"a run must be judged by a metric that its validations give, got {name}; they give "
            f"{', '.join(sorted(one for one in metrics if one.startswith('validation_')))}",
            reason=Reason.METRIC_NOT_MEASURED,
            metadata={"metric": name},
        )
    return metrics[name]
