"""The verdict of an evaluation, from answers whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from tests.evaluation.judged import evaluated

from luthier.evaluation.evaluations.verdicts import Advantage, records_to_settle, verdict_of
from luthier.v1.evaluation_pb2 import (
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_REAL,
    VERDICT_BETTER,
    Comparison,
    Evaluation,
    EvaluationArm,
)
from luthier.v1.grader_pb2 import GraderResult
from luthier.v1.judge_pb2 import JudgeResult
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

Outcome = EvaluationVerdict.Outcome


def guard(score: str = "field_match.parsed", max_loss: float = 0.0, arm: str = "") -> Guard:
    return Guard(score=ScoreGuard(score=score, max_loss=max_loss, baseline_arm_id=arm))


def test_fine_tuning_wins_where_the_candidate_is_better_than_every_prompting_arm() -> None:
    verdict = verdict_of(evaluated({"zero": 0, "few": 12}, tuned=30, count=48))
    assert verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    assert (verdict.candidate_arm_id, verdict.rival_arm_id, verdict.score) == ("tuned", "few", "exact_match")
    assert list(verdict.prompting_arm_ids) == ["zero", "few"]
    assert verdict.num_records_to_settle == 0
    assert verdict.sentence.startswith(
        "Fine-tuning wins: tuned is better than every prompting arm, few the closest, on exact_match: +37.5 pp ["
    )
    assert verdict.sentence.endswith("] on 48 records.")


def test_it_does_not_win_where_it_is_better_than_all_but_one() -> None:
    verdict = verdict_of(evaluated({"zero": 0, "few": 29}, tuned=30, count=48))
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert verdict.rival_arm_id == "few"
    assert verdict.num_records_to_settle > 48
    assert f"about {verdict.num_records_to_settle:,} would" in verdict.sentence


def test_prompting_suffices_where_one_prompting_arm_is_better() -> None:
    verdict = verdict_of(evaluated({"zero": 0, "few": 30}, tuned=12, count=48))
    assert verdict.outcome == Outcome.OUTCOME_PROMPTING_SUFFICES
    assert verdict.sentence.startswith(
        "Prompting suffices: tuned is worse than few on exact_match: -37.5 pp ["
    )


def test_no_difference_needs_the_smallest_that_matters() -> None:
    arms = {"zero": 500}
    assert verdict_of(evaluated(arms, tuned=501, count=1000)).outcome == Outcome.OUTCOME_INCONCLUSIVE
    verdict = verdict_of(evaluated(arms, tuned=501, count=1000, smallest_difference=0.02))
    assert verdict.outcome == Outcome.OUTCOME_NO_DIFFERENCE
    assert "tuned and zero differ by less than 2.0 pp on exact_match: +0.1 pp" in verdict.sentence


def test_a_win_too_small_to_matter_is_no_win() -> None:
    arms = {"zero": 500}
    assert verdict_of(evaluated(arms, tuned=510, count=1000)).outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    verdict = verdict_of(evaluated(arms, tuned=510, count=1000, smallest_difference=0.05))
    assert verdict.outcome == Outcome.OUTCOME_NO_DIFFERENCE


def test_prompting_suffices_where_tuning_cannot_be_better_by_what_matters() -> None:
    """It may be worse by more than that: what is shown is that it is not worth its while."""
    verdict = verdict_of(evaluated({"zero": 30}, tuned=28, count=60, smallest_difference=0.04))
    assert verdict.outcome == Outcome.OUTCOME_PROMPTING_SUFFICES
    assert "tuned is not better than zero by 4.0 pp or more on exact_match: -3.3 pp" in verdict.sentence


def test_lower_perplexity_is_better() -> None:
    evaluation = Evaluation(
        arms=[EvaluationArm(arm_id="zero"), EvaluationArm(arm_id="tuned", tuned=True)],
        primary_score="perplexity",
        candidate_arm_id="tuned",
        comparisons=[
            Comparison(
                candidate_arm_id="tuned",
                baseline_arm_id="zero",
                score="perplexity",
                difference=-3.0,
                lower=-4.0,
                upper=-2.5,
                count=48,
                kind=SCORE_KIND_REAL,
                direction=SCORE_DIRECTION_LOWER_IS_BETTER,
                verdict=VERDICT_BETTER,
            )
        ],
    )
    verdict = verdict_of(evaluation)
    assert verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    assert verdict.sentence.endswith("on perplexity: +3 [+2.5, +4] on 48 records.")


def test_the_candidate_may_stand_before_its_rivals() -> None:
    evaluation = evaluated({"zero": 0}, tuned=30, count=48, first=True)
    assert evaluation.comparisons[0].candidate_arm_id == "zero"
    assert verdict_of(evaluation).outcome == Outcome.OUTCOME_FINE_TUNE_WINS


@pytest.mark.parametrize(
    ("arms", "missing"),
    [
        ([EvaluationArm(arm_id="a"), EvaluationArm(arm_id="b")], "tuned arm"),
        ([EvaluationArm(arm_id="a", tuned=True), EvaluationArm(arm_id="b", tuned=True)], "prompting arm"),
    ],
)
def test_without_both_kinds_of_arms_there_is_no_verdict(arms: list[EvaluationArm], missing: str) -> None:
    candidate = "b" if arms[1].tuned else ""
    verdict = verdict_of(Evaluation(arms=arms, primary_score="exact_match", candidate_arm_id=candidate))
    assert verdict.outcome == Outcome.OUTCOME_UNSPECIFIED
    assert f"there is no {missing}" in verdict.sentence


def test_arms_without_a_common_record_are_inconclusive() -> None:
    evaluation = evaluated({"zero": 3}, tuned=4, count=12)
    del evaluation.comparisons[:]
    verdict = verdict_of(evaluation)
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert "have no record with exact_match in common" in verdict.sentence


def test_nine_records_are_never_enough() -> None:
    verdict = verdict_of(evaluated({"zero": 0}, tuned=9, count=9))
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert verdict.num_records_to_settle == 10


def test_a_broken_guard_is_a_regression_whatever_the_primary_score_says() -> None:
    evaluation = evaluated({"zero": 0}, tuned=30, count=48, guards=[guard(max_loss=0.1)], parsed=(48, 20))
    verdict = verdict_of(evaluation)
    assert verdict.outcome == Outcome.OUTCOME_REGRESSED
    assert verdict.guards[0].standing == GuardResult.STANDING_BROKEN
    assert verdict.sentence.startswith(
        "Regressed: tuned loses more than 10.0 pp against zero on field_match.parsed: -58.3 pp ["
    )


def test_a_guard_that_holds_changes_nothing_and_one_that_does_not_tell_is_named() -> None:
    held = verdict_of(
        evaluated({"zero": 0}, tuned=30, count=48, guards=[guard(max_loss=0.2)], parsed=(48, 48))
    )
    assert held.guards[0].standing == GuardResult.STANDING_HELD
    assert held.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    assert "not settled" not in held.sentence
    evaluation = evaluated({"zero": 0}, tuned=30, count=48, guards=[guard(max_loss=0.0)], parsed=(48, 47))
    unsettled = verdict_of(evaluation)
    assert unsettled.guards[0].standing == GuardResult.STANDING_UNDECIDED
    assert unsettled.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    assert "not settled: tuned may lose more than 0.0 pp against zero" in unsettled.sentence


def test_a_guard_stands_where_it_stands_worst() -> None:
    evaluation = evaluated(
        {"zero": 0, "few": 0},
        tuned=30,
        count=48,
        guards=[guard("exact_match"), guard("exact_match", 0.0, "few")],
    )
    for comparison in evaluation.comparisons:
        if comparison.baseline_arm_id == "zero" and comparison.candidate_arm_id == "tuned":
            comparison.difference, comparison.lower, comparison.upper = -0.5, -0.7, -0.3
    standings = [result.standing for result in verdict_of(evaluation).guards]
    assert standings == [GuardResult.STANDING_BROKEN, GuardResult.STANDING_HELD]


@pytest.mark.parametrize(("gained", "lost"), [(0.16, 0.08), (0.35, 0.25)])
def test_as_many_records_as_it_says_settle_it_four_times_in_five(gained: float, lost: float) -> None:
    """The difference that was seen being the true one."""
    from luthier.grading.metrics import paired_binary

    count = 200
    lower, upper = paired_binary.bounds(gained * count, lost * count, count, 0.95)
    advantage = Advantage(
        rival="zero",
        value=gained - lost,
        lower=float(lower),
        upper=float(upper),
        count=count,
        confidence=0.95,
        is_share=True,
        tells=True,
    )
    wanted = records_to_settle(advantage, 0.0)
    generator = np.random.Generator(np.random.Philox(17))
    drawn = generator.multinomial(wanted, [gained, lost, 1 - gained - lost], size=10_000)
    p_values = paired_binary.p_values(drawn[:, 0], drawn[:, 1], wanted)
    settled = float(((p_values <= 0.05) & (drawn[:, 0] > drawn[:, 1])).mean())
    assert 0.77 <= settled <= 0.83


@pytest.mark.parametrize(
    ("long", "is_bounded"), [(1, True), (400, True), (600, False), (2_000, False), (50_000, False)]
)
def test_one_long_record_among_many_asks_for_no_absurd_number_of_others(long: int, is_bounded: bool) -> None:
    """Of so few degrees of freedom an interval is thousands of errors wide, which more records do not make up for."""
    from luthier.grading.metrics.paired import rate_difference

    generator = np.random.Generator(np.random.Philox(3))
    sizes = [1] * 199 + [long]
    mine = [size * float(generator.normal(1.0, 1.0)) for size in sizes]
    told = rate_difference(mine, [0.0] * 200, sizes).interval(0.95).told()
    advantage = Advantage(
        rival="zero",
        value=told.value,
        lower=told.lower,
        upper=told.upper,
        count=told.count,
        confidence=0.95,
        is_share=False,
        tells=told.lower < told.upper,
    )
    assert advantage.is_bounded == is_bounded
    assert records_to_settle(advantage, 0.0) < 50 * 200


def test_nobody_can_say_how_many_records_show_a_difference_that_was_not_seen() -> None:
    equal = evaluated({"zero": 20}, tuned=20, count=48)
    verdict = verdict_of(equal)
    assert verdict.num_records_to_settle == 0
    assert "depends on the smallest difference that matters" in verdict.sentence
    equal.smallest_difference = 0.01
    assert verdict_of(equal).num_records_to_settle > 48


def unscattered(difference: float, *, guarded: float, smallest: float = 0.0) -> Evaluation:
    """An evaluation whose graders gave the same difference to each of 48 records, as rows say it."""

    def row(score: str, value: float) -> Comparison:
        return Comparison(
            candidate_arm_id="tuned",
            baseline_arm_id="zero",
            score=score,
            difference=value,
            lower=value,
            upper=value,
            p_value=0.0,
            count=48,
            kind=SCORE_KIND_REAL,
            verdict=VERDICT_BETTER,
        )

    return Evaluation(
        arms=[EvaluationArm(arm_id="zero"), EvaluationArm(arm_id="tuned", tuned=True)],
        primary_score="grader.fair",
        candidate_arm_id="tuned",
        smallest_difference=smallest,
        guards=[guard("grader.kind", 0.5)],
        comparisons=[row("grader.fair", difference), row("grader.kind", guarded)],
    )


@pytest.mark.parametrize(
    ("difference", "smallest", "guarded"),
    [(1.0, 0.0, 0.0), (1.0, 0.0, -3.0), (-1.0, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0)],
)
def test_differences_without_an_interval_settle_no_verdict_and_no_guard(
    difference: float, smallest: float, guarded: float
) -> None:
    """Ten answers of 10 out of 10 each do not show that no loss is possible."""
    verdict = verdict_of(unscattered(difference, guarded=guarded, smallest=smallest))
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert verdict.num_records_to_settle == 0
    assert (
        f"48 records do not tell tuned from zero on grader.fair: {difference:+.4g} (interval not known); they differ "
        "by as much on each or rest on one alone, which does not tell how far others lie" in verdict.sentence
    )
    (result,) = verdict.guards
    assert result.standing == GuardResult.STANDING_UNDECIDED
    assert "tuned may lose more than 0.5 against zero on grader.kind" in result.sentence


@pytest.mark.parametrize(("num_errors", "is_told"), [(5, True), (96, False), (10, False)])
@pytest.mark.parametrize("kind", ["judge", "grader"])
def test_a_judge_or_grader_that_seldom_judged_decides_nothing(
    kind: str, num_errors: int, is_told: bool
) -> None:
    score = f"{kind}.fair"
    evaluation = evaluated({"zero": 0}, tuned=30, count=48, guards=[guard(score)])
    evaluation.primary_score = score
    for one in evaluation.comparisons:
        one.score = score
    if kind == "judge":
        evaluation.judge_results.append(JudgeResult(judge_id="fair", num_asked=96, num_errors=num_errors))
    else:
        evaluation.grader_results.append(GraderResult(name="fair", num_graded=96, num_errors=num_errors))
    verdict = verdict_of(evaluation)
    if is_told:
        assert verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
        return
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    things = "judgements" if kind == "judge" else "grades"
    assert verdict.sentence.startswith(
        f"Inconclusive: {96 - num_errors} of 96 {things} came of fair, and 90% must"
    )
    assert verdict.guards[0].standing == GuardResult.STANDING_UNDECIDED
