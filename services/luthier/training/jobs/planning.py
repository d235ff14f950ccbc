"""What a job would do, found out from row lengths alone, and whether it can be done at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.errors import FailedPrecondition, FieldViolation, Reason
from luthier.training.jobs.domain import Hyperparameters, Plan
from luthier.training.jobs.settings import JobSettings, wrong_fields
from luthier.training.recipes.batches import (
    BatchSettings,
    PlanTotals,
    RowLength,
    count_steps,
    teaching_rows,
)
from luthier.training.teaching import Taught

_NAMED_RECORDS = 5
_LOW_EFFICIENCY = 0.5
MAX_PASSED_ROWS = 20_000_000
"""Most rows, counted anew in each epoch, that a plan looks at: somewhat over a minute of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """Records of one split that were not rendered as they are."""

    num_dropped: int = 0
    num_truncated: int = 0
    num_unsupervised: int = 0


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
    unsupervised_records: tuple[UnsupervisedRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    taught: Taught | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Row lengths of a rendering by split."""

    train: tuple[RowLength, ...]
    validation: tuple[RowLength, ...]


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


def make_plan(settings: JobSettings, rendering: RenderingView, lengths: Lengths, context_length: int) -> Plan:
    """Count what the job would do. Takes some 4 s for each pass over a million rows.

    Raises:
        InvalidArgument: the longest row does not fit into a step or a forward pass (SEQUENCE_TOO_LONG), or there
            are more than `MAX_PASSED_ROWS` to count over all epochs.
        FailedPrecondition: NO_SUPERVISED_TOKENS, or rows are longer than the model's context
            (SEQUENCE_TOO_LONG).
    """
    _require_teaching(rendering, lengths)
    _require_fitting(settings.hyperparameters, lengths, context_length)
    _require_countable(settings.hyperparameters, teaching_rows(lengths.train))
    totals = count_steps(lengths.train, batch_settings(settings.hyperparameters))
    validation_rows = teaching_rows(lengths.validation)
    return Plan(
        num_train_rows=totals.num_rows,
        num_validation_rows=len(validation_rows),
        num_steps=totals.num_steps,
        num_steps_per_epoch=totals.num_steps_per_epoch,
        num_tokens=totals.num_tokens,
        num_supervised_tokens=totals.num_supervised,
        packing_efficiency=totals.packing_efficiency,
        num_dropped=rendering.train.num_dropped,
        num_truncated=rendering.train.num_truncated,
        num_unsupervised=rendering.train.num_unsupervised,
        warnings=tuple(_warnings(settings, rendering, totals, len(validation_rows))),
    )


def _require_teaching(rendering: RenderingView, lengths: Lengths) -> None:
    if teaching_rows(lengths.train):
        return
    if not lengths.train:
        raise FailedPrecondition(
            f"{rendering.name} must have training rows, it has none "
            f"({rendering.train.num_dropped} were dropped for their length)",
            reason=Reason.NO_SUPERVISED_TOKENS,
            metadata={"rendering": rendering.name},
        )
    named = rendering.unsupervised_records[:_NAMED_RECORDS]
    places = "; ".join(f"{record.filename} line {record.line}: {record.message}" for record in named)
    raise FailedPrecondition(
        f"at least one training row of {rendering.name} must have a supervised token, none of "
        f"{len(lengths.train)} has; the first: {places}",
        reason=Reason.NO_SUPERVISED_TOKENS,
        metadata={"rendering": rendering.name, **_first_place(named)},
    )


def _first_place(records: Sequence[UnsupervisedRecord]) -> Mapping[str, str]:
    return {"filename": records[0].filename, "line": str(records[0].line)} if records else {}


def _require_fitting(chosen: Hyperparameters, lengths: Lengths, context_length: int) -> None:
    teaching = [*teaching_rows(lengths.train), *teaching_rows(lengths.validation)]
    longest = max(teaching, key=lambda row: row.num_tokens)
    if context_length and longest.num_tokens > context_length:
        raise FailedPrecondition(
            f"rows must have at most the base model's {context_length} tokens, row {longest.row} has "
            f"{longest.num_tokens}; create the rendering with a smaller max_tokens",
            reason=Reason.SEQUENCE_TOO_LONG,
            metadata={"row": str(longest.row), "num_tokens": str(longest.num_tokens)},
        )
    limits = {"micro_batch_tokens": (chosen.micro_batch_tokens, longest.num_tokens)}
    if chosen.batch_tokens:
        longest_train = max(row.num_tokens for row in teaching_rows(lengths.train))
        limits["batch_tokens"] = (chosen.batch_tokens, longest_train)
    violations = [
        FieldViolation(
            field=f"fine_tuning_job.hyperparameters.{name}",
            description=f"hyperparameters.{name} must be at least {least}, the longest row, got {value}",
            reason=Reason.SEQUENCE_TOO_LONG,
        )
        for name, (value, least) in limits.items()
        if value < least
    ]
    if violations:
        raise wrong_fields(*violations)


def _require_countable(chosen: Hyperparameters, rows: Sequence[RowLength]) -> None:
    """Refuse a job whose steps would take the service minutes to count."""
    epochs = chosen.num_epochs
    if chosen.max_steps:
        if chosen.batch_rows:
            steps_per_epoch = math.ceil(len(rows) / chosen.batch_rows)
        else:
            steps_per_epoch = math.ceil(sum(row.num_tokens for row in rows) / chosen.batch_tokens)
        epochs = min(epochs, math.ceil(chosen.max_steps / steps_per_epoch))
    if epochs * len(rows) <= MAX_PASSED_ROWS:
        return
    most = MAX_PASSED_ROWS // len(rows)
    raise wrong_fields(
        FieldViolation(
            field="fine_tuning_job.hyperparameters.num_epochs",
            description=f"hyperparameters.num_epochs must be at most {most} for {len(rows)} training rows, "
            f"got {chosen.num_epochs}; or set max_steps",
        )
    )


def _warnings(
    settings: JobSettings, rendering: RenderingView, totals: PlanTotals, num_validation_rows: int
) -> Iterator[str]:
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
