"""Evaluations between plain values and the wire."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from luthier.errors import DataLoss, FieldViolation, InvalidArgument
from luthier.evaluation.asking import ArmTemplate, Asking, TemplateSource
from luthier.evaluation.evaluations.domain import (
    DEFAULT_NEW_TOKENS,
    AnswerFile,
    Arm,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationState,
    Metric,
    ScoreEstimate,
    Split,
    Verdict,
)
from luthier.evaluation.metrics.scores import ScoreKind, find_score, is_right
from luthier.v1 import dataset_pb2, evaluation_pb2, event_pb2
from luthier.work.convert import failure_to_status
from luthier.worker.v1 import task_pb2

_EPOCH = datetime.fromtimestamp(0).astimezone()


def evaluation_from_proto(message: evaluation_pb2.Evaluation) -> Evaluation:
    """Read what a caller wants; name, outcome and other output-only fields stay empty."""
    metrics = tuple(metric_from_proto(metric) for metric in message.metrics)
    return Evaluation(
        name="",
        uid="",
        state=EvaluationState.QUEUED,
        labels=dict(message.labels),
        create_time=_EPOCH,
        update_time=_EPOCH,
        revision=1,
        dataset_version=message.dataset_version,
        arms=tuple(_arm_from_proto(arm) for arm in message.arms),
        display_name=message.display_name,
        split=_split_from_proto(message.split),
        max_records=message.max_records,
        seed=message.seed,
        metrics=metrics or (Metric.EXACT_MATCH,),
        max_new_tokens=message.max_new_tokens or DEFAULT_NEW_TOKENS,
    )


def _arm_from_proto(arm: evaluation_pb2.EvaluationArm) -> Arm:
    try:
        name = evaluation_pb2.ArmTemplate.Name(arm.template)
    except ValueError:
        raise _not_one_of("evaluation.arms.template", ArmTemplate, arm.template) from None
    return Arm(
        arm_id=arm.arm_id,
        model=arm.model,
        num_shots=arm.num_shots,
        chat_template=arm.chat_template,
        template=ArmTemplate(name.removeprefix("ARM_TEMPLATE_")),
    )


def _arm_to_proto(arm: Arm) -> evaluation_pb2.EvaluationArm:
    template = evaluation_pb2.ArmTemplate.Value(f"ARM_TEMPLATE_{arm.template}")
    return evaluation_pb2.EvaluationArm(**{**asdict(arm), "template": template})


def asking_to_proto(asking: Asking) -> task_pb2.Asking:
    """Write how a model is asked."""
    message = task_pb2.Asking(
        template_source=evaluation_pb2.TemplateSource.Value(f"TEMPLATE_SOURCE_{asking.source}"),
        chat_template=asking.chat_template,
        template_date=asking.template_date,
        stop_token_ids=asking.stop_token_ids,
        eos_token_ids=asking.eos_token_ids,
        old_prefix=asking.old_prefix,
    )
    if asking.prefix_token_ids is not None:
        message.prefix.CopyFrom(task_pb2.PrefixTokens(token_ids=asking.prefix_token_ids))
    return message


def metric_from_proto(metric: evaluation_pb2.EvaluationMetric.ValueType) -> Metric:
    """Read a metric.

    Raises:
        InvalidArgument: it is none, or one that this code does not know.
    """
    try:
        return Metric(evaluation_pb2.EvaluationMetric.Name(metric).removeprefix("EVALUATION_METRIC_"))
    except ValueError:
        raise _not_one_of("evaluation.metrics", Metric, metric) from None


def _split_from_proto(split: dataset_pb2.Split.ValueType) -> Split:
    if split == dataset_pb2.SPLIT_UNSPECIFIED:
        return Split.TEST
    try:
        return Split(dataset_pb2.Split.Name(split).removeprefix("SPLIT_"))
    except ValueError:
        raise _not_one_of("evaluation.split", Split, split) from None


def _not_one_of(field: str, known: Iterable[str], number: int) -> InvalidArgument:
    description = f"must be one of {', '.join(known)}, got number {number}"
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description))


def evaluation_to_proto(evaluation: Evaluation) -> evaluation_pb2.Evaluation:
    """Write an evaluation as callers see it."""
    message = evaluation_pb2.Evaluation(
        name=evaluation.name,
        uid=evaluation.uid,
        display_name=evaluation.display_name,
        labels=evaluation.labels,
        state=evaluation_pb2.Evaluation.State.Value(f"STATE_{evaluation.state}"),
        dataset_version=evaluation.dataset_version,
        split=dataset_pb2.Split.Value(f"SPLIT_{evaluation.split}"),
        max_records=evaluation.max_records,
        seed=evaluation.seed,
        arms=[_arm_to_proto(arm) for arm in evaluation.arms],
        metrics=[
            evaluation_pb2.EvaluationMetric.Value(f"EVALUATION_METRIC_{metric}")
            for metric in evaluation.metrics
        ],
        max_new_tokens=evaluation.max_new_tokens,
        arm_results=[_arm_result_to_proto(result) for result in evaluation.arm_results],
        comparisons=[_comparison_to_proto(comparison) for comparison in evaluation.comparisons],
        num_records=evaluation.num_records,
        warnings=evaluation.warnings,
        dataset_digest=evaluation.dataset_digest,
        model_digests=evaluation.model_digests,
        create_time=_time(evaluation.create_time),
        update_time=_time(evaluation.update_time),
        etag=f'"{evaluation.revision}"',
    )
    if evaluation.progress is not None:
        message.progress.CopyFrom(event_pb2.Progress(**asdict(evaluation.progress)))
    if evaluation.failure is not None:
        message.error.CopyFrom(failure_to_status(evaluation.failure))
    if evaluation.end_time is not None:
        message.end_time.CopyFrom(_time(evaluation.end_time))
    return message


def evaluation_to_spec(evaluation: Evaluation, answers: Sequence[AnswerFile]) -> task_pb2.EvaluateSpec:
    """Write what a worker needs to run an evaluation, going on after the answers that are there."""

    def reference(name: str) -> task_pb2.ModelReference:
        return task_pb2.ModelReference(name=name, digest=evaluation.model_digests[name])

    arms = []
    for arm in evaluation.arms:
        adapter = reference(arm.model) if arm.model != evaluation.base_model else None
        found = task_pb2.ArmModel(arm=_arm_to_proto(arm), adapter=adapter)
        if arm.arm_id in evaluation.askings:
            found.asking.CopyFrom(asking_to_proto(evaluation.askings[arm.arm_id]))
        arms.append(found)
    return task_pb2.EvaluateSpec(
        evaluation=evaluation_to_proto(evaluation),
        base_model=reference(evaluation.base_model),
        arms=arms,
        checkpoint_files=[task_pb2.BlobFile(**asdict(file)) for file in answers],
    )


def answer_file_from_proto(message: task_pb2.BlobFile) -> AnswerFile:
    """Read a file of answers."""
    return AnswerFile(path=message.path, sha256=message.sha256, size_bytes=message.size_bytes)


def arm_result_from_proto(message: evaluation_pb2.ArmResult) -> ArmResult:
    """Read the result of an arm."""
    return ArmResult(
        arm_id=message.arm_id,
        scores=tuple(
            ScoreEstimate(
                score=score.score,
                value=score.value,
                lower=score.lower,
                upper=score.upper,
                count=score.count,
                kind=_kind_from_proto(score.kind),
                higher_is_better=_direction_from_proto(score.direction),
                text_form=_form_from_proto(score.text_form),
            )
            for score in message.scores
        ),
        num_generated_tokens=message.num_generated_tokens,
        num_prompt_tokens=message.num_prompt_tokens,
        duration_seconds=message.duration_seconds,
        num_cut=message.num_cut,
        template_source=TemplateSource(
            evaluation_pb2.TemplateSource.Name(message.template_source).removeprefix("TEMPLATE_SOURCE_")
        ),
        template_digest=message.template_digest,
        template_date=message.template_date,
        num_errors=message.num_errors,
    )


def comparison_from_proto(message: evaluation_pb2.Comparison) -> Comparison:
    """Read a comparison."""
    return Comparison(
        candidate_arm_id=message.candidate_arm_id,
        baseline_arm_id=message.baseline_arm_id,
        score=message.score,
        difference=message.difference,
        lower=message.lower,
        upper=message.upper,
        p_value=message.p_value if message.HasField("p_value") else None,
        count=message.count,
        verdict=Verdict(evaluation_pb2.Verdict.Name(message.verdict).removeprefix("VERDICT_")),
        kind=_kind_from_proto(message.kind),
        higher_is_better=_direction_from_proto(message.direction),
    )


def prediction_from_bytes(data: bytes) -> evaluation_pb2.Prediction:
    """Read a stored prediction, and say of its answers whether they are right.

    Raises:
        DataLoss: it is none.
    """
    try:
        prediction = evaluation_pb2.Prediction.FromString(data)
    except DecodeError as error:
        raise DataLoss(f"a stored prediction of {len(data)} bytes cannot be read: {error}") from error
    for answer in prediction.answers:
        answer.correctness = _CORRECTNESS[is_right(answer.scores)]
    return prediction


_CORRECTNESS = {
    None: evaluation_pb2.CORRECTNESS_UNSPECIFIED,
    True: evaluation_pb2.CORRECTNESS_RIGHT,
    False: evaluation_pb2.CORRECTNESS_WRONG,
}


def _kind_from_proto(number: evaluation_pb2.ScoreKind.ValueType) -> ScoreKind | None:
    if number == evaluation_pb2.SCORE_KIND_UNSPECIFIED:
        return None
    try:
        return ScoreKind(evaluation_pb2.ScoreKind.Name(number).removeprefix("SCORE_KIND_"))
    except ValueError:
        raise _not_one_of("kind", ScoreKind, number) from None


def _direction_from_proto(number: evaluation_pb2.ScoreDirection.ValueType) -> bool | None:
    known = {
        evaluation_pb2.SCORE_DIRECTION_UNSPECIFIED: None,
        evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER: True,
        evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER: False,
    }
    if number not in known:
        raise _not_one_of("direction", evaluation_pb2.ScoreDirection.keys(), number)
    return known[number]


def _form_from_proto(number: evaluation_pb2.TextForm.ValueType) -> str | None:
    if number not in evaluation_pb2.TextForm.values():
        raise _not_one_of("text_form", evaluation_pb2.TextForm.keys(), number)
    name = evaluation_pb2.TextForm.Name(number).removeprefix("TEXT_FORM_")
    return None if name == "UNSPECIFIED" else name


def _arm_result_to_proto(result: ArmResult) -> evaluation_pb2.ArmResult:
    values = asdict(result)
    values["scores"] = [_score_to_proto(score) for score in result.scores]
    source = evaluation_pb2.TemplateSource.Value(f"TEMPLATE_SOURCE_{result.template_source}")
    values["template_source"] = source
    return evaluation_pb2.ArmResult(**values)


def _score_to_proto(score: ScoreEstimate) -> evaluation_pb2.ScoreEstimate:
    values = asdict(score) | _meaning(score)
    del values["higher_is_better"]
    values["text_form"] = evaluation_pb2.TextForm.Value(f"TEXT_FORM_{score.text_form or 'UNSPECIFIED'}")
    return evaluation_pb2.ScoreEstimate(**values)


def _comparison_to_proto(comparison: Comparison) -> evaluation_pb2.Comparison:
    values = asdict(comparison) | _meaning(comparison)
    del values["higher_is_better"]
    values["verdict"] = evaluation_pb2.Verdict.Value(f"VERDICT_{comparison.verdict}")
    return evaluation_pb2.Comparison(**values)


def _meaning(result: ScoreEstimate | Comparison) -> dict[str, int]:
    """What its score is, on the wire. A result older than them means what its score means now."""
    kind, higher_is_better = result.kind, result.higher_is_better
    known = find_score(result.score)
    if kind is None and known is not None:
        kind, higher_is_better = known.kind, known.higher_is_better
    better = {None: "UNSPECIFIED", True: "HIGHER_IS_BETTER", False: "LOWER_IS_BETTER"}[higher_is_better]
    return {
        "kind": evaluation_pb2.ScoreKind.Value(f"SCORE_KIND_{kind or 'UNSPECIFIED'}"),
        "direction": evaluation_pb2.ScoreDirection.Value(f"SCORE_DIRECTION_{better}"),
        "whole_answer": known is not None and known.whole_answer,
    }


def _time(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message
