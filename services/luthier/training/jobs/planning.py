"""What a job would do, found out from row lengths alone, and whether it can be done at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.training.jobs.methods import described, judged_by, main_metric, rendering_kind
from luthier.training.jobs.mixing import mixture_warnings
from luthier.training.jobs.ranks import rank_warnings, require_work_for_ranks
from luthier.training.jobs.reinforcement import answer_tokens, answers_per_row
from luthier.training.jobs.split_counts import num_idle, num_teaching, statistics_of
from luthier.training.recipe_settings import (
    batch_settings,
    measure_of,
    mixture_of,
    renderings_used,
    schedule_of,
)
from luthier.training.recipes.survey import (
    Longest,
    PackedLengths,
    Survey,
    first_rows,
    require_fitting,
)
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan, RenderingUse
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_SUPERVISED,
    RENDERING_KIND_UNPAIRED,
    Rendering,
    RenderingKind,
    RenderingSplitStatistics,
    UnsupervisedRecord,
)

_NAMED_RECORDS = 5
_LOW_EFFICIENCY = 0.5
_ROLES_OF: Mapping[str, Sequence[str]] = {
    "validation_reward_chosen": ("desirable",),
    "validation_reward_rejected": ("undesirable",),
    "validation_reward_margin": ("desirable", "undesirable"),
}
"""Of answers with a label: what a metric is measured on."""
MAX_PASSED_ROWS = 20_000_000
"""Most rows, counted anew in each epoch, whose steps a run counts: somewhat over a minute of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLengths:
    """Row lengths of a rendering by split."""

    train: PackedLengths = field(default_factory=PackedLengths)
    validation: PackedLengths = field(default_factory=PackedLengths)


def joined(parts: Sequence[SplitLengths]) -> tuple[SplitLengths, tuple[int, ...]]:
    """Return the lengths of several renderings numbered through, and the number of the first row of each."""
    firsts = first_rows([part.train, part.validation] for part in parts)
    if len(parts) == 1:
        return parts[0], firsts
    whole = SplitLengths()
    for part, first in zip(parts, firsts, strict=True):
        whole.train.extend(part.train, first)
        whole.validation.extend(part.validation, first)
    return whole, firsts


def require_usable(job: FineTuningJob, rendering: Rendering, tokenizer_digest: str) -> None:
    """Check that a job can learn from a rendering, with the tokenizer of its base model.

    Raises:
        FailedPrecondition: it is not READY, or was made with another tokenizer (WRONG_STATE); RENDERING_KIND_MISMATCH
            for one of another kind than the job's method learns from.
    """
    if rendering.state != Rendering.STATE_READY:
        state = Rendering.State.Name(rendering.state).removeprefix("STATE_")
        why = f": {rendering.error.message}" if rendering.HasField("error") else ""
        raise FailedPrecondition(
            f"{rendering.name} must be READY, it is {state}{why}",
            metadata={"name": rendering.name, "state": state},
        )
    _require_kind(job, rendering)
    if rendering.tokenizer_digest != tokenizer_digest:
        raise FailedPrecondition(
            f"{rendering.name} must be made with the tokenizer of {job.base_model} (digest {tokenizer_digest}), "
            f"it was made with digest {rendering.tokenizer_digest}; create a rendering for this model",
            metadata={"name": rendering.name, "tokenizer_digest": rendering.tokenizer_digest},
        )


def _require_kind(job: FineTuningJob, rendering: Rendering) -> None:
    wanted, found = rendering_kind(job), rendering.kind or RENDERING_KIND_SUPERVISED
    if found == wanted:
        return
    kind, learner = _kind_name(found), described(job)
    raise FailedPrecondition(
        f"{rendering.name} must be of kind {_kind_name(wanted)}, from which a {learner} job learns, it is of kind "
        f"{kind}; create a rendering of {rendering.dataset_version} of that kind for this job",
        reason=Reason.RENDERING_KIND_MISMATCH,
        metadata={"name": rendering.name, "kind": kind, "method": learner},
    )


def _kind_name(kind: RenderingKind.ValueType) -> str:
    return RenderingKind.Name(kind).removeprefix("RENDERING_KIND_")


def check_counts(job: FineTuningJob, renderings: Sequence[Rendering], context_length: int) -> None:
    """Refuse what the statistics of a job's renderings, its own first, alone show to be impossible, in no time.

    What they cannot tell, as the longest row may be one that teaches nothing or part of a longer unit, is left
    to whoever has the lengths.

    Raises:
        InvalidArgument: the longest row does not fit into a step or a forward pass (SEQUENCE_TOO_LONG), or there
            are more than `MAX_PASSED_ROWS` to count over all epochs.
        FailedPrecondition: NO_SUPERVISED_TOKENS, METRIC_NOT_MEASURED, or rows are longer than the model's context
            (SEQUENCE_TOO_LONG).
    """
    more = answer_tokens(job)
    for number, rendering in enumerate(renderings):
        train = statistics_of(rendering, SPLIT_TRAIN)
        validation = statistics_of(rendering, SPLIT_VALIDATION)
        if not num_teaching(train):
            raise nothing_to_learn(rendering)
        if job.HasField("selection") and judged_by(job)[1] == number:
            _require_measured(job, rendering, validation)
        known = Survey(
            num_train_rows=train.tokens.count,
            num_teaching_rows=num_teaching(train),
            num_validation_rows=num_teaching(validation),
            longest_train=_with(_longest_unit(train), more),
            longest=_with(_longest_unit(train, validation), more),
            longest_row=_with(_longest(train, validation), more),
            totals=None,
        )
        of = rendering.name if len(renderings) > 1 else ""
        require_fitting(known, batch_settings(job), context_length, more, of)
    _require_countable(job, [statistics_of(rendering, SPLIT_TRAIN) for rendering in renderings])


def _require_measured(job: FineTuningJob, rendering: Rendering, validation: RenderingSplitStatistics) -> None:
    """Refuse a selection by a metric that is measured on rows that there are none of."""
    if not num_teaching(validation):
        raise FailedPrecondition(
            f"{rendering.name} must have validation rows that teach, as {job.selection.metric} is measured on them, it "
            "has none; leave selection out or split the version so that there are some",
            reason=Reason.METRIC_NOT_MEASURED,
            metadata={"metric": job.selection.metric, "rendering": rendering.name},
        )
    if rendering_kind(job) != RENDERING_KIND_UNPAIRED or not validation.roles:
        return
    found = {one.role for one in validation.roles if one.tokens.count}
    missing = [role for role in _ROLES_OF.get(judged_by(job)[0], ()) if role not in found]
    if missing:
        raise FailedPrecondition(
            f"{rendering.name} must have {missing[0]} validation rows, as {job.selection.metric} is measured on them, "
            "it has none; choose another metric or split the version so that there are some",
            reason=Reason.METRIC_NOT_MEASURED,
            metadata={"metric": job.selection.metric, "rendering": rendering.name},
        )


def make_plan(
    job: FineTuningJob, renderings: Sequence[Rendering], found: Survey, context_length: int
) -> FineTuningPlan:
    """Say what the job would do, all its defaults filled in, from a survey of its rows.

    `renderings` are its own and those that are mixed in.

    Raises:
        InvalidArgument: the longest row does not fit into a step or a forward pass (SEQUENCE_TOO_LONG).
        FailedPrecondition: NO_SUPERVISED_TOKENS, or rows are longer than the model's context
            (SEQUENCE_TOO_LONG).
    """
    require_learnable(job, renderings, found, context_length)
    totals = found.totals
    assert totals is not None, "rows that teach and fit were counted"
    train = statistics_of(renderings[0], SPLIT_TRAIN)
    mixture = mixture_of(job, [0] * len(renderings))
    used = renderings_used(found, mixture, [rendering.digest for rendering in renderings])
    return FineTuningPlan(
        num_train_rows=found.num_teaching_rows,
        num_validation_rows=found.num_validation_rows,
        num_steps=totals.num_steps,
        num_steps_per_epoch=totals.num_steps_per_epoch,
        num_tokens=totals.num_tokens * answers_per_row(job),
        num_supervised_tokens=totals.num_supervised * answers_per_row(job),
        packing_efficiency=totals.packing_efficiency,
        num_dropped=train.num_dropped,
        num_truncated=train.num_truncated,
        num_unsupervised=num_idle(train),
        warnings=plan_warnings(job, renderings, found, used),
        resolved_job=job,
        renderings=used,
    )


def require_learnable(
    job: FineTuningJob, renderings: Sequence[Rendering], found: Survey, context_length: int
) -> None:
    """Refuse what a survey shows to be impossible. Raises as `make_plan`, TOO_MANY_RANKS among it."""
    for rendering, part in zip(renderings, (found, *found.mixed), strict=True):
        if part.longest_train is None:
            raise nothing_to_learn(rendering)
        of = rendering.name if found.mixed else ""
        require_fitting(part, batch_settings(job), context_length, answer_tokens(job), of)
    require_work_for_ranks(job, found)


def _schedule_warnings(job: FineTuningJob, num_steps: int) -> Iterator[str]:
    chosen, schedule = job.hyperparameters, schedule_of(job, num_steps)
    peak = max(schedule.learning_rate(step) for step in (schedule.warmup_steps + 1, 1) if step <= num_steps)
    if schedule.warmup_steps >= num_steps:
        said = "warmup_steps" if chosen.warmup_steps else "warmup_ratio"
        yield (
            f"{said} is {getattr(chosen, said):g} and there are {num_steps} steps: the learning "
            f"rate never reaches its peak; make {said} smaller"
        )
    elif peak < schedule.peak:
        said = "decay_steps" if chosen.decay_steps else "decay_ratio"
        yield (
            f"{said} is {getattr(chosen, said):g} and there are {num_steps} steps: the learning rate falls from the "
            f"first one on and never reaches its peak; make {said} smaller"
        )


def _selection_warnings(job: FineTuningJob) -> Iterator[str]:
    chosen = job.hyperparameters
    if job.HasField("selection") and not job.validation_interval_steps and chosen.num_epochs == 1:
        yield (
            "there is one validation, after the only epoch, so that selection chooses nothing and patience ends "
            "nothing; set validation_interval_steps"
        )


def nothing_to_learn(rendering: Rendering) -> FailedPrecondition:
    """Return the error for a rendering without a training row that teaches, naming the first records."""
    train = statistics_of(rendering, SPLIT_TRAIN)
    if not train.tokens.count:
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
        f"{train.tokens.count} has; the first: {places}",
        reason=Reason.NO_SUPERVISED_TOKENS,
        metadata={"rendering": rendering.name, **_first_place(named)},
    )


def _first_place(records: Sequence[UnsupervisedRecord]) -> Mapping[str, str]:
    return {"filename": records[0].filename, "line": str(records[0].line)} if records else {}


def _longest(*splits: RenderingSplitStatistics) -> Longest | None:
    """Return the longest row, None where it may be one that teaches nothing."""
    if any(map(num_idle, splits)):
        return None
    return Longest(num_tokens=max(split.tokens.maximum for split in splits))


def _with(longest: Longest | None, more: int) -> Longest | None:
    return None if longest is None else replace(longest, num_tokens=longest.num_tokens + more)


def _longest_unit(*splits: RenderingSplitStatistics) -> Longest | None:
    """Return the longest unit that teaches, where units of several rows were counted; else the longest row."""
    num_rows, num_units = sum(one.tokens.count for one in splits), sum(one.num_units for one in splits)
    if not num_units or num_units == num_rows:
        return _longest(*splits)
    num_tokens = max(split.longest_unit_tokens for split in splits)
    return Longest(num_tokens=num_tokens, num_rows=num_rows // num_units) if num_tokens else None


def _require_countable(job: FineTuningJob, splits: Sequence[RenderingSplitStatistics]) -> None:
    """Refuse a job whose steps would take minutes to count; `splits` are the training rows of its renderings."""
    chosen = job.hyperparameters
    rows, num_tokens = _one_epoch(job, splits)
    if rows > MAX_PASSED_ROWS and len(splits) > 1:
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="fine_tuning_job.mixed_renderings",
                description=f"must take at most {MAX_PASSED_ROWS} rows an epoch, {rows} are asked for, as "
                f"{job.rendering} has a share of {job.rendering_share:g}; give it a larger one",
            )
        )
    epochs = chosen.num_epochs
    if chosen.max_steps:
        if chosen.batch_rows:
            steps_per_epoch = math.ceil(rows / chosen.batch_rows)
        else:
            steps_per_epoch = math.ceil(num_tokens / chosen.batch_tokens)
        epochs = min(epochs, math.ceil(chosen.max_steps / steps_per_epoch))
    if epochs * rows <= MAX_PASSED_ROWS:
        return
    most = MAX_PASSED_ROWS // rows
    raise InvalidArgument.of_fields(
        FieldViolation(
            field="fine_tuning_job.hyperparameters.num_epochs",
            description=f"must be at most {most} for {rows} training rows, got {chosen.num_epochs}; "
            "or set max_steps",
        )
    )


def _one_epoch(job: FineTuningJob, splits: Sequence[RenderingSplitStatistics]) -> tuple[int, int]:
    """Return about how many rows and tokens an epoch has, those that are mixed in among them."""
    own, *mixed = splits
    rows, num_tokens = num_teaching(own), own.tokens.sum
    for share, split in zip((one.share for one in job.mixed_renderings), mixed, strict=True):
        passes = share / job.rendering_share * _learnt(job, own) / _learnt(job, split)
        rows += round(passes * num_teaching(split))
        num_tokens += round(passes * split.tokens.sum)
    return rows, num_tokens


def _learnt(job: FineTuningJob, split: RenderingSplitStatistics) -> int:
    """Return how much of what shares are of a split has."""
    if measure_of(job) == "TOKENS":
        return max(1, split.supervised_tokens.sum)
    return split.num_units or num_teaching(split)


def plan_warnings(
    job: FineTuningJob, renderings: Sequence[Rendering], found: Survey, used: Sequence[RenderingUse]
) -> Iterator[str]:
    """Yield what a user would want to change or to know before training."""
    totals = found.totals
    assert totals is not None, "the steps were counted"
    chosen = job.hyperparameters
    for number, (rendering, part) in enumerate(zip(renderings, (found, *found.mixed), strict=True)):
        of = f"{rendering.name}: " if found.mixed else ""
        suffix = f"_{number}" if number else ""
        yield from (of + text for text in _row_warnings(job, rendering))
        if not part.num_validation_rows:
            yield f"{of}there are no validation rows, so {main_metric(job)}{suffix} is not measured"
    if used:
        yield from mixture_warnings(renderings, used)
    yield from _schedule_warnings(job, totals.num_steps)
    yield from _selection_warnings(job)
    yield from rank_warnings(job, found)
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
    for rendering in renderings:
        of = f"{rendering.name}: " if found.mixed else ""
        yield from (of + text for text in rendering.warnings)


def _row_warnings(job: FineTuningJob, rendering: Rendering) -> Iterator[str]:
    counts = statistics_of(rendering, SPLIT_TRAIN)
    # A record that is a unit of two rows counts twice here.
    counted = "records" if rendering_kind(job) == RENDERING_KIND_SUPERVISED else "rows"
    if num_idle(counts):
        first = next(iter(rendering.unsupervised_records), None)
        place = f", the first is {first.filename} line {first.line}: {first.message}" if first else ""
        yield f"{num_idle(counts)} training {counted} have no supervised token and are not used{place}"
    if counts.num_dropped:
        yield f"{counts.num_dropped} training records are longer than the rendering's max_tokens and left out"
    if counts.num_truncated:
        yield f"{counts.num_truncated} training {counted} are cut at max_tokens of the rendering"
