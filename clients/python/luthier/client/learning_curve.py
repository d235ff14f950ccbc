"""Would more data help? Tune on parts of the data, evaluate all of them together, and see what each doubling brings."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from luthier.client import datasets, evaluations, jobs, renderings
from luthier.client.curve_fit import (
    CURVE_LABEL,
    RECORDS_LABEL,
    CurveFit,
    CurvePoint,
    curve_points,
    fitted,
    more_data_words,
)
from luthier.client.data_parts import RecordParts
from luthier.client.flows import Scope
from luthier.client.uploads import upload
from luthier.errors import AlreadyExists, FieldViolation, InvalidArgument, NotFound
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION, DatasetSource, DatasetVersion, Split
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.rendering_pb2 import Rendering

if TYPE_CHECKING:
    from collections.abc import Awaitable

SHARES = (0.1, 0.3, 1.0)
MAX_SHARES = 8
PART_LABEL = "learning-curve-part"
"""Of a version of a curve: a digest of what it is made of."""
T = TypeVar("T")
Telling = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """What came of it: the evaluation of all models, each model's point, and the line through them.

    `points` are empty and `fit` is None where fewer than two models have the primary score; `words` say so.
    """

    evaluation: Evaluation
    points: Sequence[CurvePoint]
    fit: CurveFit | None
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of the data, and the job that learns from it."""

    part_id: str
    num_records: int
    rendering: str


async def learning_curve(
    scope: Scope,
    job: FineTuningJob,
    evaluation: Evaluation,
    *,
    curve_id: str,
    shares: Sequence[float] = SHARES,
    tell: Telling | None = None,
) -> LearningCurve:
    """Tune on parts of a rendering's records, evaluate all models on the same held-out records, and fit their scores.

    Each part is a dataset version of its own, of dataset `curve_id`: the train records are put in an order by a hash of
    the job's seed and the record, and a part is the first of them, so that a smaller one lies within a larger one;
    validation records are the same in all. Rendering and job of a part are those given but for it: with a number of
    epochs a part makes fewer steps. `evaluation` brings the arms besides, e.g. prompts; its version is the rendering's
    unless it says another, its candidate the model of the largest part unless it says another.

    What exists by the ids that are made of `curve_id` is taken as it is, so that the call can be made again after a
    break. Needs pyarrow (extra `arrow`). `tell` is called with what is being done.

    Raises:
        InvalidArgument: shares, or what a curve cannot be made of; as the calls that it makes.
        AlreadyExists: `curve_id` names what is none of the curve's, or a version of other records.
        JobFailed, EvaluationFailed, RenderingFailed, VersionFailed: one of the parts.
    """
    _check(job, shares)
    say = tell or (lambda _: None)
    whole = await renderings.get(scope, job.rendering)
    parts = await _parts(scope, whole, job, curve_id, sorted(set(shares)), say)
    # All are queued before the first is waited for: several workers tune at a time.
    begun = [await _begun(scope, job, part, curve_id, say) for part in parts]
    ended = [await jobs.wait_until_done(scope, one.name) for one in begun]
    models = [one.tuned_model for one in ended]
    wanted = _evaluation(evaluation, whole, curve_id, parts, models)
    say(f"evaluating {len(wanted.arms)} arms")
    made = await _made(
        lambda: evaluations.create(scope, wanted, evaluation_id=curve_id),
        lambda: evaluations.get(scope, curve_id),
    )
    _require_own(made, curve_id)
    done = await evaluations.wait_until_done(scope, made.name)
    by_model = dict(zip(models, ended, strict=True))
    return curve_of(done, curve_points(done, by_model))


def curve_of(done: Evaluation, points: Sequence[CurvePoint]) -> LearningCurve:
    """Return what came of an evaluation that has ended; without points, that there is no curve."""
    if not points:
        words = f"No curve: fewer than two of its models have a score {done.primary_score} in {done.name}."
        return LearningCurve(evaluation=done, points=points, fit=None, words=words)
    return LearningCurve(
        evaluation=done, points=points, fit=fitted(points), words=more_data_words(done, points)
    )


def _check(job: FineTuningJob, shares: Sequence[float]) -> None:
    if not 2 <= len(set(shares)) <= MAX_SHARES or not all(0 < share <= 1 for share in shares):
        shown = ", ".join(f"{share:g}" for share in shares)
        raise _refused(
            "shares", f"must be 2 to {MAX_SHARES} different shares above 0 and at most 1, got {shown}"
        )
    if job.mixed_renderings:
        raise _refused(
            "job.mixed_renderings",
            "must be empty: of a mixture less data of one rendering is more of the others, not less to learn from",
        )


async def _parts(
    scope: Scope, whole: Rendering, job: FineTuningJob, curve_id: str, shares: Sequence[float], say: Telling
) -> list[_Part]:
    with tempfile.TemporaryDirectory(prefix="luthier-curve-") as folder:
        train = RecordParts(Path(folder), job.hyperparameters.seed)
        try:
            say("reading the train split")
            await _read(scope, whole.dataset_version, SPLIT_TRAIN, train)
            counts = [round(share * len(train)) for share in shares]
            if counts[0] < 1 or len(set(counts)) < len(counts):
                shown = ", ".join(f"{share:g}" for share in shares)
                raise _refused(
                    "shares", f"must be parts of different sizes of {len(train):,} train records, got {shown}"
                )
            return [
                await _part(scope, whole, curve_id, share, count, train, say)
                for share, count in zip(shares, counts, strict=True)
            ]
        finally:
            train.close()


async def _part(
    scope: Scope, whole: Rendering, curve_id: str, share: float, count: int, train: RecordParts, say: Telling
) -> _Part:
    """Return a part of the data, rendered; all of it is what was there before."""
    part_id = f"p{100 * share:g}".replace(".", "-")
    if count == len(train):
        return _Part(part_id=part_id, num_records=count, rendering=whole.name)
    say(f"making {count:,} of {len(train):,} train records a version and a rendering")
    version = await _version(scope, whole, f"{curve_id}/{part_id}", count, train)
    wanted = Rendering(
        dataset_version=version.name,
        model=whole.model,
        chat_template=whole.chat_template,
        mask_mode=whole.mask_mode,
        max_tokens=whole.max_tokens,
        length_policy=whole.length_policy,
        split_turns=whole.split_turns,
        template_error_policy=whole.template_error_policy,
        kind=whole.kind,
        labels={CURVE_LABEL: curve_id},
    )
    rendering_id = f"{curve_id}-{part_id}"
    made = await _made(
        lambda: renderings.create(scope, wanted, rendering_id=rendering_id),
        lambda: renderings.get(scope, rendering_id),
    )
    if made.dataset_version != version.name:
        raise AlreadyExists(f"{made.name} exists and is of {made.dataset_version}; choose another curve_id")
    rendering = await renderings.wait_until_ready(scope, made.name)
    return _Part(part_id=part_id, num_records=count, rendering=rendering.name)


async def _version(
    scope: Scope, whole: Rendering, name: str, count: int, train: RecordParts
) -> DatasetVersion:
    """Return the version of a part; one that is there must be of these very records."""
    dataset_id, version_id = name.split("/")
    labels = {CURVE_LABEL: dataset_id, PART_LABEL: await _part_digest(scope, whole, count, train)}
    try:
        found = await datasets.get_version(scope, name)
    except NotFound:
        pass
    else:
        if found.labels.get(PART_LABEL, "") != labels[PART_LABEL]:
            raise AlreadyExists(
                f"{found.name} exists and is not {count:,} records of {whole.dataset_version} as seed {train.seed} "
                "chooses them; choose another curve_id",
                metadata={"name": found.name},
            )
        return await datasets.wait_for_version(scope, found.name)
    await _made(
        lambda: datasets.create(scope, dataset_id, labels={CURVE_LABEL: dataset_id}),
        lambda: datasets.get(scope, dataset_id),
    )
    with tempfile.TemporaryDirectory(prefix="luthier-curve-") as folder:
        held = RecordParts(Path(folder), 0)
        try:
            await _read(scope, whole.dataset_version, SPLIT_VALIDATION, held)
            files = [(SPLIT_TRAIN, *one) for one in train.write(count, f"train-{version_id}")]
            files += [
                (SPLIT_VALIDATION, *one) for one in (held.write(len(held), "validation") if len(held) else [])
            ]
            sources = [
                DatasetSource(upload=(await upload(scope, path)).name, split=split, format=found_format)
                for split, found_format, path in files
            ]
        finally:
            held.close()
    made = await datasets.create_version(
        scope, dataset_id, sources, version_id=version_id, settings=DatasetVersion(labels=labels)
    )
    return await datasets.wait_for_version(scope, made.name)


async def _part_digest(scope: Scope, whole: Rendering, count: int, train: RecordParts) -> str:
    """Return what tells parts apart: of which version's records, and how many as which seed orders them."""
    version = await datasets.get_version(scope, whole.dataset_version)
    return hashlib.sha256(f"{version.uid}/{version.digest}/{train.seed}/{count}".encode()).hexdigest()[:32]


async def _read(scope: Scope, version: str, split: Split.ValueType, into: RecordParts) -> None:
    async for batch in datasets.read_records(scope, version, split=split):
        for record_id, record in zip(
            batch.column("record_id").to_pylist(), batch.column("record").to_pylist(), strict=True
        ):
            into.add(record_id, record)


async def _begun(scope: Scope, job: FineTuningJob, part: _Part, curve_id: str, say: Telling) -> FineTuningJob:
    """Return the job that learns from a part."""
    job_id = f"{curve_id}-{part.part_id}"
    wanted = FineTuningJob()
    wanted.CopyFrom(job)
    wanted.rendering, wanted.tuned_model_id = part.rendering, job_id
    wanted.labels[CURVE_LABEL], wanted.labels[RECORDS_LABEL] = curve_id, str(part.num_records)
    say(f"tuning on {part.num_records:,} records: {job_id}")
    made = await _made(lambda: jobs.create(scope, wanted, job_id=job_id), lambda: jobs.get(scope, job_id))
    _require_own(made, curve_id)
    return made


def _evaluation(
    given: Evaluation,
    whole: Rendering,
    curve_id: str,
    parts: Sequence[_Part],
    models: Sequence[str],
) -> Evaluation:
    wanted = Evaluation()
    wanted.CopyFrom(given)
    if not wanted.dataset_version:
        wanted.dataset_version = whole.dataset_version
    for part, model in zip(parts, models, strict=True):
        wanted.arms.add(arm_id=part.part_id, model=model)
    wanted.candidate_arm_id = given.candidate_arm_id or parts[-1].part_id
    wanted.labels[CURVE_LABEL] = curve_id
    return wanted


async def _made(create: Callable[[], Awaitable[T]], get: Callable[[], Awaitable[T]]) -> T:
    """Make a resource, or return it where an earlier call made it."""
    try:
        return await create()
    except AlreadyExists:
        return await get()


def _require_own(found: FineTuningJob | Evaluation, curve_id: str) -> None:
    if found.labels.get(CURVE_LABEL, "") != curve_id:
        raise AlreadyExists(
            f"{found.name} exists and is no part of the learning curve {curve_id}; choose another curve_id",
            metadata={"name": found.name},
        )


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description))
