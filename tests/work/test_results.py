"""What workers hand in: every kind of result by the limits of its family, each fault named with its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from luthier.data.datasets import rules as datasets
from luthier.data.renderings import rules as renderings
from luthier.errors import Failure, InvalidArgument, Reason
from luthier.evaluation.evaluations import result_rules as evaluations
from luthier.runtime.field_limits import LimitTable
from luthier.training.jobs import rules as jobs
from luthier.training.models import rules as models
from luthier.v1 import dataset_pb2, evaluation_pb2, model_pb2, rendering_pb2
from luthier.work.results import check_result, require_kind
from luthier.work.tasks import Outcome, Task, TaskKind, TaskState
from luthier.worker.v1.task_pb2 import (
    AnswerShareResult,
    BlobFile,
    BuildVersionResult,
    EvaluateResult,
    ExportResult,
    MergeResult,
    RegisterModelResult,
    RenderResult,
    Shard,
    TaskResult,
    TrainResult,
)

LIMITS: Mapping[TaskKind, LimitTable] = {
    TaskKind.BUILD_VERSION: datasets.RESULT_LIMITS,
    TaskKind.RENDER: renderings.RESULT_LIMITS,
    TaskKind.REGISTER_MODEL: models.RESULT_LIMITS,
    TaskKind.TRAIN: jobs.RESULT_LIMITS,
    TaskKind.EVALUATE: evaluations.RESULT_LIMITS,
    TaskKind.MERGE: models.MAKING_RESULT_LIMITS,
    TaskKind.EXPORT: models.MAKING_RESULT_LIMITS,
    TaskKind.ANSWER_SHARE: evaluations.SHARE_LIMITS,
}
DIGEST = "0123456789abcdef" * 4
FILE = BlobFile(path="a/b", sha256=DIGEST, size_bytes=3)
ERROR = dataset_pb2.RecordError(filename="a.jsonl", line=2, path="p", reason="MISSING_FIELD", message="m")
LENGTHS = rendering_pb2.LengthStatistics(count=1, sum=2, minimum=2, maximum=2, mean=2.0)
CHECK = model_pb2.WeightsCheck(num_positions=9, difference=0.01, bound=0.05, held_out_logprobs=[-1.5])
FAILED = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="why")


def built() -> BuildVersionResult:
    return BuildVersionResult(
        shards=[Shard(file=FILE, num_rows=3)],
        statistics=dataset_pb2.DatasetStatistics(
            splits=[dataset_pb2.SplitStatistics(split=dataset_pb2.SPLIT_TRAIN, num_records=3)],
            num_records=3,
        ),
        digest=DIGEST,
        errors=[ERROR],
        formats=[dataset_pb2.DATASET_FORMAT_ALPACA, dataset_pb2.DATASET_FORMAT_UNSPECIFIED],
    )


def rendered() -> RenderResult:
    finding = rendering_pb2.RenderingFinding(
        kind=rendering_pb2.RenderingFinding.KIND_ONLY_END_LEARNT,
        num_records=1,
        records=[rendering_pb2.RenderingFindingRecord(filename="a.jsonl", line=1, message="m")],
    )
    splits = [rendering_pb2.RenderingSplitStatistics(split=dataset_pb2.SPLIT_TEST, tokens=LENGTHS)]
    unlearnt = rendering_pb2.UnsupervisedRecord(record_id=DIGEST, filename="a.jsonl", line=1, message="m")
    return RenderResult(
        shards=[Shard(file=FILE, num_rows=3)],
        split_statistics=splits,
        unsupervised_records=[unlearnt],
        warnings=["w"],
        digest=DIGEST,
        tokenizer=FILE,
        errors=[ERROR],
        num_errors=1,
        findings=[finding],
        effective_chat_template="t" * 300_000,
        prefix_token_ids=[1],
        stop_token_ids=[2, 3],
    )


def registered() -> RegisterModelResult:
    return RegisterModelResult(
        files=[model_pb2.ModelFile(path="tokenizer.json", sha256=DIGEST, size_bytes=2, tokenizer=True)],
        architecture="LlamaForCausalLM",
        num_parameters=5,
        context_length=64,
        has_chat_template=True,
        tokenizer_digest=DIGEST,
        hub_commit="abc",
        eos_token_ids=[2],
        warnings=["w"],
    )


def evaluated() -> EvaluateResult:
    score: dict[str, Any] = {
        "kind": evaluation_pb2.SCORE_KIND_BINARY,
        "direction": evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER,
        "score": "exact_match",
        "count": 3,
    }
    arm = evaluation_pb2.ArmResult(
        arm_id="zero",
        scores=[evaluation_pb2.ScoreEstimate(value=0.5, **score)],
        template_source=evaluation_pb2.TEMPLATE_SOURCE_BASE,
        template_digest=DIGEST,
        template_date="2026-11-28",
    )
    comparison = evaluation_pb2.Comparison(
        candidate_arm_id="tuned",
        baseline_arm_id="zero",
        p_value=1.0,
        verdict=evaluation_pb2.VERDICT_BETTER,
        **score,
    )
    return EvaluateResult(
        arm_results=[arm], comparisons=[comparison], num_records=3, predictions=FILE, warnings=["w"]
    )


def whole_results() -> Mapping[str, Any]:
    """One good result of each kind, with all that a worker may say."""
    return {
        "build_version": built(),
        "render": rendered(),
        "register_model": registered(),
        "train": TrainResult(files=[FILE], step=3, metrics={"train_loss": 0.5}),
        "evaluate": evaluated(),
        "merge": MergeResult(files=[FILE], check=CHECK, warnings=["w"]),
        "export": ExportResult(files=[FILE], check=CHECK, warnings=["w"]),
        "answer_share": AnswerShareResult(num_records=3, predictions=FILE),
    }


def outcome(name: str, result: Any, **fields: Any) -> Outcome:
    return Outcome(result=TaskResult(**{name: result}), **fields)


def refused(name: str, change: Callable[[Any], object], **fields: Any) -> list[str]:
    result = whole_results()[name]
    change(result)
    try:
        check_result(outcome(name, result, **fields), LIMITS)
    except InvalidArgument as error:
        return [f"{one.field}: {one.description}" for one in error.violations]
    return []


def test_a_whole_result_of_every_kind_passes() -> None:
    results = whole_results()
    assert set(results) == {field.name for field in TaskResult.DESCRIPTOR.oneofs_by_name["result"].fields}
    assert {kind.lower() for kind in LIMITS} == set(results)
    for name, result in results.items():
        check_result(outcome(name, result), LIMITS)


@pytest.mark.parametrize("name", sorted(whole_results()))
def test_an_empty_result_is_a_part_of_one_and_no_result(name: str) -> None:
    empty = type(whole_results()[name])()
    check_result(outcome(name, empty, cancelled=True), LIMITS)
    check_result(outcome(name, empty, failure=FAILED), LIMITS)
    with pytest.raises(InvalidArgument) as caught:
        check_result(outcome(name, empty), LIMITS)
    assert caught.value.reason == Reason.FIELD_REQUIRED
    assert all(one.field.startswith(f"result.{name}.") for one in caught.value.violations)


def test_no_result_is_no_bad_result() -> None:
    check_result(Outcome(cancelled=True), LIMITS)
    check_result(Outcome(failure=FAILED), LIMITS)


def many(part: Any, number: int) -> list[Any]:
    return [part] * number


NOT_A_DIGEST = "must be 64 lowercase hex digits, got 'ABC'"
SPLITS = "must be one of TRAIN, VALIDATION, TEST, got number 0"
FAULTS: Mapping[str, tuple[str, Callable[[Any], object], list[str]]] = {
    "no digest": (
        "build_version",
        lambda result: result.ClearField("digest"),
        ["result.build_version.digest: must be 64 lowercase hex digits, got nothing"],
    ),
    "a digest that is none": (
        "render",
        lambda result: setattr(result, "digest", "ABC"),
        [f"result.render.digest: {NOT_A_DIGEST}"],
    ),
    "a file whose digest is none, of a shard": (
        "build_version",
        lambda result: result.shards.add(file=BlobFile(path="b", sha256="ABC")),
        [f"result.build_version.shards[1].file.sha256: {NOT_A_DIGEST}"],
    ),
    "a file without a digest": (
        "train",
        lambda result: result.files.add(path="b"),
        ["result.train.files[1].sha256: must be set, got nothing"],
    ),
    "a file without a path": (
        "register_model",
        lambda result: result.files.add(sha256=DIGEST),
        ["result.register_model.files[1].path: must be set, got nothing"],
    ),
    "predictions whose digest is none": (
        "evaluate",
        lambda result: setattr(result.predictions, "sha256", "ABC"),
        [f"result.evaluate.predictions.sha256: {NOT_A_DIGEST}"],
    ),
    "a split that has no name": (
        "build_version",
        lambda result: result.statistics.splits.add(num_records=1),
        [f"result.build_version.statistics.splits[1].split: {SPLITS}"],
    ),
    "a rendering's split that has no name": (
        "render",
        lambda result: result.split_statistics.add(),
        [f"result.render.split_statistics[1].split: {SPLITS}"],
    ),
    "a finding of no kind": (
        "render",
        lambda result: result.findings[0].ClearField("kind"),
        [
            "result.render.findings[0].kind: must be one of JOINED_BOUNDARY, INEXACT_BOUNDARY, ONLY_END_LEARNT, "
            "TURN_NOT_WRITTEN, ARGUMENTS_NOT_OBJECT, ASKED_DIFFERENTLY, END_NOT_LEARNT, EQUAL_SIDES, "
            "EQUAL_WITHIN_LIMIT, NO_MISMATCHED_ANSWER, MISMATCHED_CUT, CHOSEN_SIDE_TAKEN, ..., got number 0"
        ],
    ),
    "a comparison without a verdict": (
        "evaluate",
        lambda result: result.comparisons[0].ClearField("verdict"),
        [
            "result.evaluate.comparisons[0].verdict: must be one of BETTER, WORSE, INCONCLUSIVE, "
            "INSUFFICIENT_EVIDENCE, got number 0"
        ],
    ),
    "a score without kind and direction": (
        "evaluate",
        lambda result: result.arm_results[0].scores.add(score="exact_match"),
        [
            "result.evaluate.arm_results[0].scores[1].kind: must be one of BINARY, FRACTION, REAL, got number 0",
            "result.evaluate.arm_results[0].scores[1].direction: must be one of HIGHER_IS_BETTER, LOWER_IS_BETTER, "
            "got number 0",
        ],
    ),
    "what the service writes itself": (
        "evaluate",
        lambda result: setattr(result.arm_results[0].scores[0], "whole_answer", True),
        [
            "result.evaluate.arm_results[0].scores[0].whole_answer: must not be set, as the service writes it, got True"
        ],
    ),
    "a probability above 1": (
        "evaluate",
        lambda result: setattr(result.comparisons[0], "p_value", 1.5),
        ["result.evaluate.comparisons[0].p_value: must be in 0..1, got 1.5"],
    ),
    "a date that is none": (
        "evaluate",
        lambda result: setattr(result.arm_results[0], "template_date", "today"),
        ["result.evaluate.arm_results[0].template_date: must be a date, YYYY-MM-DD, got 'today'"],
    ),
    "a model without files": (
        "register_model",
        lambda result: result.ClearField("files"),
        ["result.register_model.files: must hold 1 to 1000 files, got 0"],
    ),
    "a job without steps": (
        "train",
        lambda result: result.ClearField("step"),
        [f"result.train.step: must be in 1..{jobs.MAX_STEPS}, got 0"],
    ),
    "no tokenizer": (
        "render",
        lambda result: result.ClearField("tokenizer"),
        ["result.render.tokenizer: must be set, got nothing"],
    ),
    "no statistics": (
        "build_version",
        lambda result: result.ClearField("statistics"),
        ["result.build_version.statistics: must be set, got nothing"],
    ),
    "a version without rows": (
        "build_version",
        lambda result: result.ClearField("shards"),
        ["result.build_version.shards: must hold 1 to 20000 shards, got 0"],
    ),
    "too many bad records": (
        "build_version",
        lambda result: result.errors.extend(many(ERROR, 1000)),
        ["result.build_version.errors: must hold at most 1000 bad records, got 1001"],
    ),
    "too many records of a finding": (
        "render",
        lambda result: result.findings[0].records.extend(many(result.findings[0].records[0], 100)),
        ["result.render.findings[0].records: must hold at most 100 records, got 101"],
    ),
    "too many warnings": (
        "register_model",
        lambda result: result.warnings.extend(many("w", 1000)),
        ["result.register_model.warnings: must hold at most 1000 warnings, got 1001"],
    ),
    "a warning without measure": (
        "evaluate",
        lambda result: result.warnings.append("w" * 65_537),
        ["result.evaluate.warnings[1]: must be at most 65536 characters, got 65537"],
    ),
    "too many metrics": (
        "train",
        lambda result: result.metrics.update({str(number): 1.0 for number in range(10_000)}),
        ["result.train.metrics: must hold at most 10000 metrics, got 10001"],
    ),
    "too many arms": (
        "evaluate",
        lambda result: result.arm_results.extend(many(result.arm_results[0], 16)),
        ["result.evaluate.arm_results: must hold 1 to 16 arms, got 17"],
    ),
    "several at once": (
        "build_version",
        lambda result: (result.ClearField("digest"), result.errors.add(), result.ClearField("statistics")),
        [
            "result.build_version.statistics: must be set, got nothing",
            "result.build_version.digest: must be 64 lowercase hex digits, got nothing",
            "result.build_version.errors[1].filename: must be set, got nothing",
            "result.build_version.errors[1].reason: must be set, got nothing",
        ],
    ),
}


@pytest.mark.parametrize("case", sorted(FAULTS))
def test_what_breaks_a_rule_is_named_with_its_place(case: str) -> None:
    name, change, said = FAULTS[case]
    assert refused(name, change) == said


def test_of_a_part_only_what_is_there_is_looked_at() -> None:
    def cut(result: Any) -> None:
        for field in ("shards", "digest", "statistics"):
            result.ClearField(field)

    assert refused("build_version", cut, failure=FAILED) == []
    assert refused("build_version", lambda result: result.errors.add(), cancelled=True) == [
        "result.build_version.errors[1].filename: must be set, got nothing",
        "result.build_version.errors[1].reason: must be set, got nothing",
    ]


def test_a_result_is_one_of_this_services_kinds() -> None:
    data = {kind: LIMITS[kind] for kind in (TaskKind.BUILD_VERSION, TaskKind.RENDER)}
    with pytest.raises(
        InvalidArgument, match="result: must be one of build_version, render, got train"
    ) as caught:
        check_result(outcome("train", whole_results()["train"]), data)
    assert caught.value.reason == Reason.INVALID_FIELD
    with pytest.raises(
        InvalidArgument, match="result: must be one of build_version, render, got nothing"
    ) as caught:
        check_result(Outcome(result=TaskResult()), data)
    assert caught.value.reason == Reason.FIELD_REQUIRED


def task(kind: TaskKind) -> Task:
    return Task(
        task_id="t",
        kind=kind,
        uid="u",
        subject="s",
        project="p",
        resources=(),
        state=TaskState.LEASED,
        epoch=1,
        attempt=1,
        worker="w",
        cancel_requested=False,
        last_local_number=0,
        losses=0,
        heard=True,
    )


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_a_result_is_of_its_tasks_kind(kind: TaskKind) -> None:
    for name, result in whole_results().items():
        handed_in = TaskResult(**{name: result})
        if name == kind.lower():
            require_kind(task(kind), handed_in)
        else:
            with pytest.raises(InvalidArgument, match=f"must be {kind.lower()}, as its task is, got {name}"):
                require_kind(task(kind), handed_in)
    with pytest.raises(InvalidArgument, match="got nothing"):
        require_kind(task(kind), TaskResult())
