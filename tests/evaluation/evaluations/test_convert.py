"""Evaluations between plain values and the wire: nothing is lost on the way, and defaults stand in one place."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import Failure, InvalidArgument
from luthier.evaluation.asking import TemplateSource
from luthier.evaluation.evaluations.convert import (
    arm_result_from_proto,
    comparison_from_proto,
    evaluation_from_proto,
    evaluation_to_proto,
    evaluation_to_spec,
    prediction_from_bytes,
)
from luthier.evaluation.evaluations.domain import (
    AnswerFile,
    Arm,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationState,
    Metric,
    Progress,
    ScoreEstimate,
    Split,
    Verdict,
)
from luthier.evaluation.metrics.scores import ScoreKind
from luthier.v1 import dataset_pb2, evaluation_pb2
from luthier.work.convert import status_to_failure

NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
SMALL = st.integers(-(2**31), 2**31 - 1)
FULL = Evaluation(
    name="projects/p/evaluations/e",
    uid="u",
    state=EvaluationState.FAILED,
    labels={"team": "a"},
    create_time=NOW,
    update_time=NOW,
    revision=7,
    dataset_version="projects/p/datasets/d/versions/v",
    arms=(Arm(arm_id="zero", model="base"), Arm(arm_id="few", model="tuned", num_shots=3)),
    display_name="First",
    split=Split.VALIDATION,
    max_records=9,
    seed=-4,
    metrics=(Metric.FIELD_MATCH, Metric.PERPLEXITY),
    max_new_tokens=33,
    base_model="base",
    dataset_digest="dv",
    model_digests={"base": "db", "tuned": "dt"},
    arm_results=(
        ArmResult(
            arm_id="zero",
            scores=(
                ScoreEstimate(
                    score="exact_match",
                    value=0.5,
                    lower=0.25,
                    upper=0.75,
                    count=9,
                    kind=ScoreKind.BINARY,
                    higher_is_better=True,
                    text_form="NFC",
                ),
                ScoreEstimate(
                    score="perplexity",
                    value=3.5,
                    lower=3.0,
                    upper=4.0,
                    count=9,
                    kind=ScoreKind.REAL,
                    higher_is_better=False,
                ),
            ),
            num_generated_tokens=100,
            num_prompt_tokens=200,
            duration_seconds=1.5,
            num_cut=2,
            template_source=TemplateSource.TAUGHT,
            template_digest="e" * 64,
            template_date="2026-01-01",
            num_errors=1,
        ),
    ),
    comparisons=(
        Comparison(
            candidate_arm_id="few",
            baseline_arm_id="zero",
            score="exact_match",
            difference=0.25,
            lower=0.1,
            upper=0.4,
            p_value=0.03,
            count=9,
            verdict=Verdict.BETTER,
            kind=ScoreKind.BINARY,
            higher_is_better=True,
        ),
    ),
    num_records=9,
    progress=Progress(phase="arm few, 2 of 2", completed=8, total=18, unit="answers", remaining_seconds=2.5),
    failure=Failure(
        code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="row 3", metadata={"row": "3"}
    ),
    end_time=NOW,
    warnings=("arm zero could not answer 1 of 9 records",),
)


def test_everything_of_an_evaluation_is_on_the_wire() -> None:
    message = evaluation_to_proto(FULL)
    unset = {field.name for field in message.DESCRIPTOR.fields} - {
        field.name for field, _ in message.ListFields()
    }
    assert unset == set()
    assert message.etag == '"7"'
    assert message.end_time.ToDatetime(UTC) == NOW
    assert [arm_result_from_proto(result) for result in message.arm_results] == list(FULL.arm_results)
    assert [comparison_from_proto(one) for one in message.comparisons] == list(FULL.comparisons)
    assert status_to_failure(message.error) == FULL.failure


def test_no_p_value_is_not_the_p_value_zero() -> None:
    for p_value in (None, 0.0):
        comparison = replace(FULL.comparisons[0], p_value=p_value)
        message = evaluation_to_proto(replace(FULL, comparisons=(comparison,)))
        assert comparison_from_proto(message.comparisons[0]).p_value == p_value


@given(
    SMALL,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 8192),
    st.sampled_from(Split),
    st.lists(st.sampled_from(Metric), min_size=1, max_size=3, unique=True),
)
def test_what_a_caller_wants_reads_back(
    max_records: int, seed: int, max_new_tokens: int, split: Split, metrics: list[Metric]
) -> None:
    wanted = replace(
        FULL,
        max_records=max_records,
        seed=seed,
        max_new_tokens=max_new_tokens,
        split=split,
        metrics=tuple(metrics),
    )
    again = evaluation_from_proto(evaluation_to_proto(wanted))
    assert (
        replace(
            again,
            **{  # output-only fields are the service's own
                name: getattr(wanted, name)
                for name in (
                    *(
                        "name",
                        "uid",
                        "state",
                        "create_time",
                        "update_time",
                        "revision",
                        "base_model",
                        "dataset_digest",
                    ),
                    *(
                        "model_digests",
                        "arm_results",
                        "comparisons",
                        "num_records",
                        "progress",
                        "failure",
                        "end_time",
                        "warnings",
                    ),
                )
            },
        )
        == wanted
    )
    assert (again.name, again.state, again.num_records) == ("", EvaluationState.QUEUED, 0)


def test_what_is_not_set_has_its_default() -> None:
    evaluation = evaluation_from_proto(evaluation_pb2.Evaluation())
    assert (evaluation.split, evaluation.metrics, evaluation.max_new_tokens) == (
        Split.TEST,
        (Metric.EXACT_MATCH,),
        256,
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (evaluation_pb2.Evaluation(metrics=[0]), r"evaluation\.metrics: must be one of .*, got number 0"),  # type: ignore[list-item]
        (evaluation_pb2.Evaluation(metrics=[9]), r"evaluation\.metrics: must be one of .*, got number 9"),  # type: ignore[list-item]
        (evaluation_pb2.Evaluation(split=9), r"evaluation\.split: must be one of TRAIN, .*, got number 9"),  # type: ignore[arg-type]
    ],
)
def test_a_number_without_a_name_is_the_callers_fault(message: evaluation_pb2.Evaluation, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        evaluation_from_proto(message)


def test_a_result_from_before_kinds_were_kept_says_what_its_score_is() -> None:
    old = ScoreEstimate(score="perplexity", value=3.5, lower=3.0, upper=4.0, count=9)
    gone = replace(old, score="bleu")
    message = evaluation_to_proto(
        replace(
            FULL,
            arm_results=(replace(FULL.arm_results[0], scores=(old, gone)),),
            comparisons=(replace(FULL.comparisons[0], kind=None, higher_is_better=None),),
        )
    )
    known, unknown = message.arm_results[0].scores
    assert known.kind == evaluation_pb2.SCORE_KIND_REAL
    assert known.direction == evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER
    assert known.text_form == evaluation_pb2.TEXT_FORM_UNSPECIFIED
    assert (unknown.kind, unknown.direction) == (0, 0)
    assert message.comparisons[0].kind == evaluation_pb2.SCORE_KIND_BINARY
    assert message.comparisons[0].direction == evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER


@pytest.mark.parametrize("field", ["kind", "direction", "text_form"])
def test_a_kind_without_a_name_is_the_workers_fault(field: str) -> None:
    score = evaluation_pb2.ScoreEstimate()
    setattr(score, field, 77)
    message = evaluation_pb2.ArmResult(scores=[score])
    with pytest.raises(InvalidArgument, match=rf"{field}: must be one of .*, got number 77"):
        arm_result_from_proto(message)


def test_a_spec_gives_an_adapter_to_the_arms_that_have_one() -> None:
    spec = evaluation_to_spec(FULL, [AnswerFile(path="a", sha256="f" * 64, size_bytes=3)])
    assert (spec.base_model.name, spec.base_model.digest) == ("base", "db")
    assert [arm.HasField("adapter") for arm in spec.arms] == [False, True]
    assert (spec.arms[1].adapter.name, spec.arms[1].adapter.digest) == ("tuned", "dt")
    assert [(arm.arm.arm_id, arm.arm.num_shots) for arm in spec.arms] == [("zero", 0), ("few", 3)]
    assert [(file.path, file.size_bytes) for file in spec.checkpoint_files] == [("a", 3)]
    assert spec.evaluation.split == dataset_pb2.SPLIT_VALIDATION


def test_a_stored_prediction_says_whether_its_answers_are_right() -> None:
    """Whatever the scores are called, and however old it is."""
    stored = evaluation_pb2.Prediction()
    for name, value in (("exact_match", 1.0), ("field_match.record", 0.0), ("perplexity", 1.0)):
        stored.answers.add(scores={name: value})
    found = [one.correctness for one in prediction_from_bytes(stored.SerializeToString()).answers]
    assert found == [
        evaluation_pb2.CORRECTNESS_RIGHT,
        evaluation_pb2.CORRECTNESS_WRONG,
        evaluation_pb2.CORRECTNESS_UNSPECIFIED,
    ]
