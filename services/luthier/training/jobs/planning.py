"""What a job would do, found out from row lengths alone, and whether it can be done at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors import FailedPrecondition, FieldViolation, Reason
from luthier.training.jobs.domain import Hyperparameters, Plan
from luthier.training.jobs.settings import JobSettings, wrong_fields
from luthier.training.recipes.batches import BatchSettings, PlanTotals
from luthier.training.recipes.survey import Longest, PackedLengths, Survey, require_fitting
from luthier.training.teaching import Taught

_NAMED_RECORDS = 5
_LOW_EFFICIENCY = 0.5
MAX_PASSED_ROWS = 20_000_000
"""Most rows, counted anew in each epoch, that a plan looks at: somewhat over a minute of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """Rows of one split by their lengths, and records that were not rendered as they are.

    Attributes:
        num_rows: rows, those that teach nothing among them.
        num_tokens: tokens of all rows.
        longest: tokens of the longest row.
        num_dropped: records left out for their length.
        num_truncated: records cut.
        num_unsupervised: rows that teach nothing.
    """

    num_rows: int = 0
    num_tokens: int = 0
    longest: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_unsupervised: int = 0

    @property
    def num_teaching(self) -> int:
        """Rows that have something to learn."""
        return self.num_rows - self.num_unsupervised


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupervisedRecord:
    """A record without a supervised token."""

    filename: str
    line: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingView:
    """What a job needs to know of a rendering.

    Attributes:
        state: its state; READY can be used.
        failure_message: why it FAILED; empty otherwise.
        train: counts of the training split.
        validation: counts of the validation split.
        unsupervised_records: the first ones, of all splits.
        warnings: findings about the template.
        taught: how a model that learns it is taught; None when it does not say.
    """

    name: str
    state: str
    digest: str
    tokenizer_digest: str
    failure_message: str = ""
    train: SplitCounts = SplitCounts()
    validation: SplitCounts = SplitCounts()
    unsupervised_records: tuple[UnsupervisedRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    taught: Taught | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Row lengths of a rendering by split."""

    train: PackedLengths = field(default_factory=PackedLengths)
    validation: PackedLengths = field(default_factory=PackedLengths)


def require_usable(rendering: RenderingView, base_model: str, tokenizer_digest: str) -> None:
    """Check that a rendering can be trained on with a base model.

    Raises:
        FailedPrecondition: it is not READY, or was made with another tokenizer (WRONG_STATE).
    """
    if rendering.state != "READY":
        why = f": {rendering.failure_message}" if rendering.failure_message else ""
        raise FailedPrecondition(
            f"{rendering.name} must be READY, it is {rendering.state}{why}",
            metadata={"name": rendering.name, "state": rendering.state},
        )
    if rendering.tokenizer_digest != tokenizer_digest:
        raise FailedPrecondition(
            f"{rendering.name} must be made with the tokenizer of {base_model} (digest {tokenizer_digest}), "
            f"it was made with digest {rendering.tokenizer_digest}; create a rendering for this model",
            metadata={"name": rendering.name, "tokenizer_digest": rendering.tokenizer_digest},
        )


def batch_settings(chosen: Hyperparameters) -> BatchSettings:
    """Return the part of the hyperparameters that decides which rows make which step."""
    return BatchSettings(
        seed=chosen.seed,
        num_epochs=chosen.num_epochs,
        max_steps=chosen.max_steps,
        batch_tokens=chosen.batch_tokens,
        batch_rows=chosen.batch_rows,
        micro_batch_tokens=chosen.micro_batch_tokens,
    )


def check_counts(settings: JobSettings, rendering: RenderingView, context_length: int) -> None:
    """Refuse what the rendering's statistics alone show to be impossible, in no time.

    What they cannot tell, as the longest row may be one that teaches nothing or part of a longer unit, is left
    to whoever has the lengths.

    Raises:
        InvalidArgument: the longest row does not fit into a step or a forward pass (SEQUENCE_TOO_LONG), or there
            are more than `MAX_PASSED_ROWS` to count over all epochs.
        FailedPrecondition: NO_SUPERVISED_TOKENS, or rows are longer than the model's context
            (SEQUENCE_TOO_LONG).
    """
    train, validation = rendering.train, rendering.validation
    if not train.num_teaching:
        raise nothing_to_learn(rendering)
    known = Survey(
        num_train_rows=train.num_rows,
        num_validation_rows=validation.num_teaching,
        longest_train=_longest(train),
        longest=_longest(train, validation),
        longest_row=_longest(train, validation),
        totals=None,
    )
    require_fitting(known, batch_settings(settings.hyperparameters), context_length)
    _require_countable(settings.hyperparameters, train)


def make_plan(settings: JobSettings, rendering: RenderingView, found: Survey, context_length: int) -> Plan:
    """Say what the job would do, from a survey of its rows.

    Raises:
        InvalidArgument: the longest row does not fit into a step or a forward pass (SEQUENCE_TOO_LONG).
        FailedPrecondition: NO_SUPERVISED_TOKENS, or rows are longer than the model's context
            (SEQUENCE_TOO_LONG).
    """
    if found.longest_train is None:
        raise nothing_to_learn(rendering)
    require_fitting(found, batch_settings(settings.hyperparameters), context_length)
    totals = found.totals
    assert totals is not None, "rows that teach and fit were counted"
    return Plan(
        num_train_rows=totals.num_rows,
        num_validation_rows=found.num_validation_rows,
        num_steps=totals.num_steps,
        num_steps_per_epoch=totals.num_steps_per_epoch,
        num_tokens=totals.num_tokens,
        num_supervised_tokens=totals.num_supervised,
        packing_efficiency=totals.packing_efficiency,
        num_dropped=rendering.train.num_dropped,
        num_truncated=rendering.train.num_truncated,
        num_unsupervised=rendering.train.num_unsupervised,
        warnings=tuple(plan_warnings(settings, rendering, totals, found.num_validation_rows)),
    )


def nothing_to_learn(rendering: RenderingView) -> FailedPrecondition:
    """Return the error for a rendering without a training row that teaches, naming the first records."""
    train = rendering.train
    if not train.num_rows:
        return FailedPrecondition(
            f"{rendering.name} must have training rows, it has none "
            f"({train.num_dropped} were dropped for their length)",
            reason=Reason.NO_SUPERVISED_TOKENS,
            metadata={"rendering": rendering.name},
        )
    named = rendering.unsupervised_records[:_NAMED_RECORDS]
    places = "; ".join(f"{record.filename} line {record.line}: {record.message}" for record in named)
    return FailedPrecondition(
        f"at least one training row of {rendering.name} must have a supervised token, none of "
        f"{train.num_rows} has; the first: {places}",
        reason=Reason.NO_SUPERVISED_TOKENS,
        metadata={"rendering": rendering.name, **_first_place(named)},
    )


def _first_place(records: Sequence[UnsupervisedRecord]) -> Mapping[str, str]:
    return {"filename": records[0].filename, "line": str(records[0].line)} if records else {}


def _longest(*splits: SplitCounts) -> Longest | None:
    """Return the longest row, None where it may be one that teaches nothing."""
    if any(split.num_unsupervised for split in splits):
        return None
    return Longest(num_tokens=max(split.longest for split in splits))


def _require_countable(chosen: Hyperparameters, train: SplitCounts) -> None:
    """Refuse a job whose steps would take minutes to count."""
    epochs, rows = chosen.num_epochs, train.num_teaching
    if chosen.max_steps:
        if chosen.batch_rows:
            steps_per_epoch = math.ceil(rows / chosen.batch_rows)
        else:
            steps_per_epoch = math.ceil(train.num_tokens / chosen.batch_tokens)
        epochs = min(epochs, math.ceil(chosen.max_steps / steps_per_epoch))
    if epochs * rows <= MAX_PASSED_ROWS:
        return
    most = MAX_PASSED_ROWS // rows
    raise wrong_fields(
        FieldViolation(
            field="fine_tuning_job.hyperparameters.num_epochs",
            description=f"hyperparameters.num_epochs must be at most {most} for {rows} training rows, "
            f"got {chosen.num_epochs}; or set max_steps",
        )
    )


def plan_warnings(
    settings: JobSettings, rendering: RenderingView, totals: PlanTotals, num_validation_rows: int
) -> Iterator[str]:
    """Yield what a user would want to change or to know before training."""
    chosen = settings.hyperparameters
    counts = rendering.train
    if counts.num_unsupervised:
        first = next(iter(rendering.unsupervised_records), None)
        place = f", the first is {first.filename} line {first.line}: {first.message}" if first else ""
        yield f"{counts.num_unsupervised} training records have no supervised token and are not used{place}"
    if counts.num_dropped:
        yield f"{counts.num_dropped} training records are longer than the rendering's max_tokens and left out"
    if counts.num_truncated:
        yield f"{counts.num_truncated} training records are cut at max_tokens of the rendering"
    if not num_validation_rows:
        yield "there are no validation rows, so validation_loss is not measured"
    if chosen.warmup_steps >= totals.num_steps:
        yield (
            f"warmup_steps is {chosen.warmup_steps} and there are {totals.num_steps} steps: the learning "
            "rate never reaches its peak; make warmup_steps smaller"
        )
    if chosen.max_steps > totals.num_steps:
        yield (
            f"max_steps is {chosen.max_steps} and num_epochs {chosen.num_epochs} ends after "
            f"{totals.num_steps} steps; raise num_epochs to go on"
        )
    if totals.packing_efficiency < _LOW_EFFICIENCY:
        yield (
            f"steps are filled to {totals.packing_efficiency:.0%} of batch_tokens; "
            "batch_rows or another batch_tokens may fit the rows better"
        )
    yield from rendering.warnings
