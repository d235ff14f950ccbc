from __future__ import annotations

import pytest
from forgetting import general, noise
from forgetting.tune import ARMS, BASE, FAST, FULL, RECORD_SCORE, Budget, have_learnt, table

from luthier.grading.suite import general_suite
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmResult,
    Comparison,
    DriftResult,
    Evaluation,
    ScoreEstimate,
    SkillDrift,
)


def share(value: float, count: int = 80) -> ScoreEstimate:
    return ScoreEstimate(
        score=RECORD_SCORE,
        value=value,
        lower=value - 0.05,
        upper=value + 0.05,
        kind=SCORE_KIND_BINARY,
        count=count,
    )


def evaluated(lower: float = 0.1) -> Evaluation:
    retained = share(0.9)
    retained.score = "retained"
    drift = [
        DriftResult(arm_id=arm, baseline_arm_id=BASE, retained=retained, skills=[SkillDrift(num_asked=160)])
        for arm in ARMS
    ]
    compared = [
        Comparison(
            score=RECORD_SCORE,
            candidate_arm_id=arm,
            baseline_arm_id=BASE,
            lower=lower,
            verdict=VERDICT_BETTER if lower > 0 else VERDICT_INCONCLUSIVE,
        )
        for arm in ARMS
    ]
    return Evaluation(
        arm_results=[ArmResult(arm_id=arm, scores=[share(0.2)]) for arm in (BASE, *ARMS)],
        comparisons=compared,
        drift_results=drift,
    )


@pytest.mark.parametrize("budget", [FAST, FULL])
def test_general_questions_differ_and_none_is_of_the_suite(budget: Budget) -> None:
    asked = general.questions(budget.general, seed=0)
    assert len(set(asked)) == len(asked) == budget.general
    assert asked == general.questions(budget.general, seed=0)
    assert not {item.prompt for item in general_suite()} & set(asked)


def test_the_table_has_a_row_for_each_arm_and_what_it_kept() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(evaluated()).splitlines()]
    assert rows[0] == ["", "whole records right", "retained", "divergence", "general text, bits a byte"]
    assert rows[2] == [BASE, "20.0 % [15.0, 25.0]", "", "", ""]
    assert [row[0] for row in rows[3:]] == ["lora", "full", "lora-replay", "full-replay"]
    assert rows[3][2] == "90.0 % [85.0, 95.0] of 80"


@pytest.mark.parametrize(("lower", "learnt"), [(0.1, True), (-0.1, False)])
def test_an_arm_must_have_learnt(lower: float, learnt: bool) -> None:
    assert have_learnt(evaluated(lower), "full-replay") is learnt


@pytest.mark.parametrize(
    ("kept", "turned", "lost", "apart"),
    [(1.0, 0.9, 0.1, True), (0.99, 0.9, 0.1, False), (1.0, 1.0, 0.91, False), (1.0, 0.3, 0.21, False)],
    ids=["kept and lost", "not all kept", "lost too little", "lost what turns by chance"],
)
def test_the_control_asks_that_all_is_kept_and_less_where_noise_was_taught(
    kept: float, turned: float, lost: float, apart: bool
) -> None:
    drift = [
        DriftResult(arm_id=arm, baseline_arm_id=noise.BASE, retained=share(value))
        for arm, value in ((noise.UNTOUCHED, kept), (noise.ROUNDED, turned), (noise.NOISE, lost))
    ]
    assert noise.are_told_apart(Evaluation(drift_results=drift)) is apart


def test_noise_is_chats_that_differ_by_seed() -> None:
    first, again, other = (list(noise.records(20, seed)) for seed in (0, 0, 1))
    assert first == again
    assert not {str(record) for record in first} & {str(record) for record in other}
    assert all([turn["role"] for turn in record["messages"]] == ["user", "assistant"] for record in first)
