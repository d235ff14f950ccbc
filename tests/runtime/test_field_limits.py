"""Limits and defaults by field path: what counts as said, what is refused and where, what is filled in."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    MAX_VIOLATIONS,
    REQUIRED,
    SHARE,
    Limit,
    LimitTable,
    characters,
    choices,
    count,
    demanded,
    fill_defaults,
    limit_violations,
    matching,
    named,
    not_negative,
    num_bytes,
    positive,
    refuse,
    required,
    under,
    whole,
)
from luthier.v1.dataset_pb2 import DatasetSource, DatasetVersion, Split
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_UNSPECIFIED,
    Evaluation,
    EvaluationArm,
    EvaluationMetric,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, LoraConfig
from luthier.v1.model_pb2 import HubSource, Model
from luthier.v1.rendering_pb2 import RenderingFinding, RenderingFindingRecord
from luthier.worker.v1.task_pb2 import BlobFile, RenderResult, Shard, TrainResult

LIMITS = {
    "lora.rank": whole(1, 8),
    "hyperparameters.num_epochs": whole(1, 8),
    "hyperparameters.batch_rows": whole(1, 8),
    "hyperparameters.batch_tokens": whole(1, 8),
}


def refused(message: Any, limits: LimitTable, field: str = "it", **options: bool) -> list[tuple[str, str]]:
    return [(one.field, one.description) for one in limit_violations(message, limits, field, **options)]


@pytest.mark.parametrize(
    ("limit", "allowed", "refused"),
    [
        (whole(1, 8), (1, 8), (0, 9, -1)),
        (positive(2.0), (1e-9, 2.0), (0.0, 2.1, -1.0, math.nan, math.inf)),
        (not_negative(2.0), (0.0, 2.0), (2.1, -0.1, math.nan, math.inf)),
        (SHARE, (0.0, 0.999), (1.0, -0.1, math.nan, math.inf)),
        (count(2, "arms"), ([], [1], [1, 2]), ([1, 2, 3],)),
        (count(2, "arms", least=1), ([1], [1, 2]), ([], [1, 2, 3])),
        (characters(2), ("", "äö"), ("abc",)),
        (num_bytes(2), ("ab", "ä", b"ab"), ("äb", "abc", b"abc")),
        (matching(re.compile("[a-z]+"), "letters"), ("ab",), ("", "a1", "a\n")),
        (DIGEST, ("0" * 64,), ("0" * 63, "A" * 64, "0" * 65)),
        (named(Split.DESCRIPTOR), (1, 3), (0,)),
    ],
)
def test_a_limit_allows_what_it_says(
    limit: Limit, allowed: tuple[Any, ...], refused: tuple[Any, ...]
) -> None:
    assert [value for value in allowed if not limit.allows(value)] == []
    assert [value for value in refused if limit.allows(value)] == []


def test_what_is_not_said_is_within_every_limit() -> None:
    assert refused(FineTuningJob(), LIMITS) == []
    assert refused(FineTuningJob(hyperparameters=Hyperparameters(num_epochs=0)), LIMITS) == []
    limits = {"tuned_model_id": DIGEST, "lora.target_modules": count(1, "names")}
    assert refused(FineTuningJob(lora=LoraConfig()), limits) == []


def test_a_field_that_knows_presence_is_refused_at_zero() -> None:
    wrong = FineTuningJob(
        lora=LoraConfig(rank=0), hyperparameters=Hyperparameters(batch_rows=0, num_epochs=-1)
    )
    assert refused(wrong, LIMITS, "job") == [
        ("job.lora.rank", "must be in 1..8, got 0"),
        ("job.hyperparameters.num_epochs", "must be in 1..8, got -1"),
        ("job.hyperparameters.batch_rows", "must be in 1..8, got 0"),
    ]


def test_the_fields_of_a_request_itself_have_no_path_before_them() -> None:
    assert refused(FineTuningJob(max_checkpoints=9), {"max_checkpoints": whole(1, 8)}, "") == [
        ("max_checkpoints", "must be in 1..8, got 9")
    ]


def test_every_wrong_value_of_a_list_is_named_with_its_place() -> None:
    arms = [EvaluationArm(arm_id=str(shots), num_shots=shots) for shots in (-1, 3, 65, 0)]
    limits = {"arms": count(3, "arms", least=1), "arms[].num_shots": whole(0, 64)}
    assert refused(Evaluation(arms=arms), limits, "evaluation") == [
        ("evaluation.arms", "must hold 1 to 3 arms, got 4"),
        ("evaluation.arms[0].num_shots", "must be in 0..64, got -1"),
        ("evaluation.arms[2].num_shots", "must be in 0..64, got 65"),
    ]


def test_a_path_leads_through_lists_in_lists_and_messages_in_lists() -> None:
    result = RenderResult(
        findings=[
            RenderingFinding(records=[RenderingFindingRecord(message="ok")]),
            RenderingFinding(
                records=[RenderingFindingRecord(message="ok"), RenderingFindingRecord(message="long")]
            ),
        ],
        shards=[Shard(file=BlobFile(sha256="0" * 64)), Shard(), Shard(file=BlobFile(sha256="x"))],
    )
    limits = {"findings[].records[].message": characters(3), "shards[].file.sha256": demanded(DIGEST)}
    assert refused(result, limits, "render") == [
        ("render.findings[1].records[1].message", "must be at most 3 characters, got 4"),
        ("render.shards[2].file.sha256", "must be 64 lowercase hex digits, got 'x'"),
    ]


def test_a_value_of_a_list_is_said_even_at_zero() -> None:
    metrics = {"metrics[]": named(EvaluationMetric.DESCRIPTOR)}
    known = ", ".join(name.removeprefix("EVALUATION_METRIC_") for name in EvaluationMetric.keys()[1:13])
    evaluation = Evaluation(metrics=[EVALUATION_METRIC_EXACT_MATCH, EVALUATION_METRIC_UNSPECIFIED])
    assert refused(evaluation, metrics, "evaluation") == [
        ("evaluation.metrics[1]", f"must be one of {known}, ..., got number 0")
    ]
    names = {"lora.target_modules[]": Limit(rule="must be a name", allows=bool)}
    job = FineTuningJob(lora=LoraConfig(target_modules=["q", ""]))
    assert refused(job, names, "job") == [("job.lora.target_modules[1]", "must be a name, got nothing")]
    assert refused(FineTuningJob(), names) == []


def test_what_is_required_must_be_said_where_its_message_is() -> None:
    limits = {"sources[].upload": required("must name an upload")}
    sources = [DatasetSource(upload="u"), DatasetSource()]
    (violation,) = limit_violations(DatasetVersion(sources=sources), limits, "version")
    assert (violation.field, violation.reason) == ("version.sources[1].upload", Reason.FIELD_REQUIRED)
    assert violation.description == "must name an upload, got nothing"
    assert refused(DatasetVersion(), limits) == []
    hub = {"hub.repo_id": demanded(characters(3))}
    assert refused(Model(), hub) == [], "a model may have another source"
    assert refused(Model(hub=HubSource()), hub) == [("it.hub.repo_id", "must be at most 3 characters, got 0")]
    assert refused(RenderResult(), {"tokenizer": REQUIRED}) == [("it.tokenizer", "must be set, got nothing")]
    assert refused(RenderResult(tokenizer=BlobFile()), {"tokenizer": REQUIRED}) == []
    assert refused(Evaluation(), {"arms": count(2, "arms", least=1)}) == [
        ("it.arms", "must hold 1 to 2 arms, got 0")
    ]


def test_a_part_need_not_say_its_own_fields_but_those_of_what_it_holds() -> None:
    limits: LimitTable = {
        "files": count(2, "files", least=1),
        "files[].sha256": (REQUIRED, DIGEST),
        "step": demanded(whole(1, 8)),
    }
    assert refused(TrainResult(), limits, is_part=True) == []
    wrong = TrainResult(files=[BlobFile()] * 3, step=9)
    assert refused(wrong, limits, is_part=True) == [
        ("it.files", "must hold 1 to 2 files, got 3"),
        *((f"it.files[{index}].sha256", "must be set, got nothing") for index in range(3)),
        ("it.step", "must be in 1..8, got 9"),
    ]


def test_of_several_limits_the_first_that_is_broken_is_named() -> None:
    limits: LimitTable = {"filename": (REQUIRED, num_bytes(2), Limit(rule="must be a", allows="a".__eq__))}

    def said(filename: str) -> list[str]:
        source = DatasetSource(filename=filename)
        return [one.description for one in limit_violations(source, limits)]

    assert said("") == ["must be set, got nothing"]
    assert said("bbb") == ["must be at most 2 bytes, got 3"]
    assert said("b") == ["must be a, got 'b'"]
    assert said("a") == []
    assert list(limit_violations(DatasetSource(filename="b"), {"filename": ANY})) == []


def test_a_refusal_shows_the_beginning_of_a_long_text_and_nothing_that_steers() -> None:
    (violation,) = limit_violations(BlobFile(sha256="\x1b" + "x" * 100_000), {"sha256": DIGEST})
    assert violation.description.startswith("must be 64 lowercase hex digits, got '\\x1bxxx")
    assert len(violation.description) < 200


def test_a_map_is_counted_as_a_list_is() -> None:
    metrics = {"metrics": count(1, "metrics")}
    assert refused(TrainResult(metrics={"loss": 1.0, "rate": 2.0}), metrics) == [
        ("it.metrics", "must hold at most 1 metrics, got 2")
    ]


def test_the_table_of_a_message_goes_where_the_message_stands() -> None:
    limits = under("files[]", {"sha256": DIGEST, "path": REQUIRED})
    assert list(limits) == ["files[].sha256", "files[].path"]
    assert refused(TrainResult(files=[BlobFile(sha256="x")]), limits) == [
        ("it.files[0].sha256", "must be 64 lowercase hex digits, got 'x'"),
        ("it.files[0].path", "must be set, got nothing"),
    ]


def test_refuse_names_all_and_no_more_than_an_answer_can_hold() -> None:
    refuse([])
    limits = {"sources[].upload": required("must name an upload")}
    version = DatasetVersion(sources=[DatasetSource()] * (MAX_VIOLATIONS + 5))
    with pytest.raises(InvalidArgument) as caught:
        refuse(limit_violations(version, limits, "version"))
    assert len(caught.value.violations) == MAX_VIOLATIONS
    assert caught.value.reason == Reason.FIELD_REQUIRED
    assert caught.value.message.startswith("version.sources[0].upload: must name an upload, got nothing; ")


def test_the_choices_of_an_enum_are_its_names_less_the_first() -> None:
    assert choices(Split.DESCRIPTOR) == "TRAIN, VALIDATION, TEST"
    assert choices(RenderingFinding.Kind.DESCRIPTOR).startswith("JOINED_BOUNDARY, INEXACT_BOUNDARY")


def test_looking_at_limits_sets_nothing() -> None:
    job = FineTuningJob()
    assert refused(job, LIMITS) == []
    assert not job.HasField("lora")
    assert not job.ListFields()


def test_defaults_fill_what_is_not_said_and_nothing_else() -> None:
    job = FineTuningJob(lora=LoraConfig(rank=0))
    fill_defaults(job, {"lora.rank": 16, "lora.alpha": 2.0, "max_checkpoints": 3})
    assert job == FineTuningJob(lora=LoraConfig(rank=0, alpha=2.0), max_checkpoints=3)


@pytest.mark.parametrize("path", ["width", "lora.width", "loras.rank", "lora[].rank"])
def test_a_path_that_is_no_field_is_a_fault(path: str) -> None:
    with pytest.raises((AttributeError, KeyError, ValueError, TypeError)):
        list(limit_violations(FineTuningJob(lora=LoraConfig()), {path: whole(1, 2)}, "job"))
