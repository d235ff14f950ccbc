"""Evaluations as values: every fault is named at once, and no move but the legal ones is made."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.evaluation.evaluations.domain import (
    FINAL_STATES,
    MAX_ARMS,
    MAX_NEW_TOKENS,
    MAX_SHOTS,
    TRANSITIONS,
    Arm,
    Evaluation,
    EvaluationState,
    Metric,
    check_evaluation,
    moved,
)
from luthier.evaluation.metrics.scores import ScoreKind
from luthier.storage.bodies import Bodies

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GOOD = Evaluation(
    name="projects/p/evaluations/e",
    uid="",
    state=EvaluationState.QUEUED,
    labels={},
    create_time=NOW,
    update_time=NOW,
    revision=1,
    dataset_version="v",
    arms=(Arm(arm_id="zero", model="m"),),
)


def test_every_fault_is_named_at_once_with_value_and_rule() -> None:
    arms = (Arm(arm_id="a", model="m", num_shots=-1), Arm(arm_id="a", model="m", num_shots=MAX_SHOTS + 1))
    bad = replace(
        GOOD, arms=arms, max_records=-2, max_new_tokens=0, metrics=(Metric.PERPLEXITY, Metric.PERPLEXITY)
    )
    with pytest.raises(InvalidArgument) as caught:
        check_evaluation(bad)
    assert [(violation.field, violation.description) for violation in caught.value.violations] == [
        ("evaluation.arms", "arm_id must be unique, got 'a' 2 times"),
        ("evaluation.arms[0].num_shots", "must be in 0..64, got -1"),
        ("evaluation.arms[1].num_shots", "must be in 0..64, got 65"),
        ("evaluation.max_records", "must not be negative, got -2"),
        ("evaluation.max_new_tokens", "must be in 1..8192, got 0"),
        ("evaluation.metrics", "must not name a metric twice"),
    ]


@given(
    st.integers(-2, MAX_ARMS + 2),
    st.integers(-2, MAX_SHOTS + 2),
    st.integers(-2, MAX_NEW_TOKENS + 2),
    st.integers(-2, 2),
)
def test_exactly_what_is_within_its_limits_passes(arms: int, shots: int, tokens: int, records: int) -> None:
    evaluation = replace(
        GOOD,
        arms=tuple(Arm(arm_id=f"arm-{number}", model="m", num_shots=shots) for number in range(arms)),
        max_new_tokens=tokens,
        max_records=records,
    )
    wrong = {
        "evaluation.arms": not 1 <= arms <= MAX_ARMS or not 0 <= shots <= MAX_SHOTS,
        "evaluation.max_new_tokens": not 1 <= tokens <= MAX_NEW_TOKENS,
        "evaluation.max_records": records < 0,
    }
    if not any(wrong.values()):
        check_evaluation(evaluation)
        return
    with pytest.raises(InvalidArgument) as caught:
        check_evaluation(evaluation)
    named = {violation.field.partition("[")[0] for violation in caught.value.violations}
    assert named == {field for field, is_wrong in wrong.items() if is_wrong}


@given(st.lists(st.sampled_from(EvaluationState), max_size=8))
def test_no_walk_leaves_a_final_state_and_each_step_is_in_the_table(walk: list[EvaluationState]) -> None:
    evaluation = GOOD
    for target in walk:
        if target in TRANSITIONS[evaluation.state]:
            evaluation = moved(evaluation, target, NOW)
            assert (evaluation.end_time == NOW) is (target in FINAL_STATES)
        else:
            before = evaluation
            with pytest.raises(FailedPrecondition, match=f"is {before.state} and cannot become {target}"):
                moved(evaluation, target, NOW)
            assert evaluation is before


def test_an_end_can_be_reached_from_everywhere_but_the_end() -> None:
    for state in set(EvaluationState) - FINAL_STATES:
        assert TRANSITIONS[state] >= {EvaluationState.CANCELLED, EvaluationState.FAILED}
    assert EvaluationState.SUCCEEDED not in TRANSITIONS[EvaluationState.QUEUED]
    assert TRANSITIONS[EvaluationState.CANCELLING] == FINAL_STATES, (
        "a cancelled evaluation is never queued again"
    )


def test_a_stored_result_from_before_kinds_were_kept_is_read() -> None:
    score = {"score": "exact_match", "value": 0.5, "lower": 0.2, "upper": 0.8, "count": 9}
    arm = {
        "arm_id": "zero",
        "scores": [score],
        "num_generated_tokens": 1,
        "num_prompt_tokens": 2,
        "duration_seconds": 0.5,
        "num_cut": 0,
    }
    bodies = Bodies(Evaluation, {"arm_results"})
    others = {name: getattr(GOOD, name) for name in GOOD.__dataclass_fields__ if name != "arm_results"}
    read = bodies.from_json({"arm_results": [arm]}, others)
    assert read.arm_results[0].scores[0].kind is None
    changed = replace(
        read.arm_results[0].scores[0], kind=ScoreKind.BINARY, higher_is_better=True, text_form="NFC"
    )
    again = replace(read, arm_results=(replace(read.arm_results[0], scores=(changed,)),))
    assert bodies.from_json(bodies.to_json(again), others) == again
