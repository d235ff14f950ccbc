"""Records that arms could not answer decide nothing: neither where they are many, nor where they could turn it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from tests.evaluation.judged import evaluated

from luthier.evaluation.completeness import (
    LEAST_GIVEN,
    Losses,
    common_words,
    losses_for,
    with_former_losses,
)
from luthier.evaluation.evaluations.telling import loss_warnings
from luthier.evaluation.evaluations.verdicts import Advantage, Relation, advantages, verdict_now, verdict_of
from luthier.evaluation.worker.comparing import comparisons_of
from luthier.evaluation.worker.losses import losses_of
from luthier.evaluation.worker.scoring import Answer
from luthier.grading.metrics.scores import BITS_PER_BYTE, PERPLEXITY
from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_REAL,
    VERDICT_BETTER,
    VERDICT_INSUFFICIENT_EVIDENCE,
    Comparison,
    Evaluation,
)
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

Outcome = EvaluationVerdict.Outcome
FAILED = Answer(text="", finish_reason="", scores={}, failed=True)


def said(**scores: float) -> Answer:
    return Answer(text="", finish_reason="STOP", scores=scores)


def primary(evaluation: Evaluation) -> Comparison:
    (found,) = (one for one in evaluation.comparisons if one.primary)
    return found


@pytest.mark.parametrize("arm", ["zero", "tuned"])
@pytest.mark.parametrize(("num_failed", "is_told"), [(0, True), (4, True), (5, False), (40, False)])
def test_a_verdict_needs_nine_of_ten_records_of_both_arms(arm: str, num_failed: int, is_told: bool) -> None:
    """48 records, of which 44 are 91.7 % and 43 are 89.6 %; the last fail, which both arms have wrong."""
    evaluation = evaluated({"zero": 0}, tuned=8, count=48, failed={arm: range(48 - num_failed, 48)})
    row, verdict = primary(evaluation), verdict_of(evaluation)
    lost = (0, num_failed) if arm == "zero" else (num_failed, 0)
    assert (row.count, row.num_lost_candidate, row.num_lost_baseline) == (48 - num_failed, *lost)
    if is_told:
        assert row.verdict == VERDICT_BETTER
        assert verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
        assert verdict.sentence.endswith(
            f"on {48 - num_failed} of 48 records." if num_failed else "48 records."
        )
        return
    assert row.verdict == VERDICT_INSUFFICIENT_EVIDENCE
    assert (verdict.outcome, verdict.rival_arm_id) == (Outcome.OUTCOME_INCONCLUSIVE, "zero")
    assert verdict.num_records_to_settle == 0
    assert verdict.sentence == (
        f"Inconclusive: tuned and zero have {48 - num_failed} of 48 records in common on exact_match "
        f"({arm} alone has no score of {num_failed}), and {LEAST_GIVEN:.0%} must be: what is lost is not lost at "
        "random."
    )


def test_what_both_arms_could_not_answer_is_lost_too() -> None:
    both = range(38, 48)
    evaluation = evaluated({"zero": 0}, tuned=30, count=48, failed={"zero": both, "tuned": both})
    assert (primary(evaluation).num_lost_both, primary(evaluation).num_lost_candidate) == (10, 0)
    verdict = verdict_of(evaluation)
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert "have 38 of 48 records in common on exact_match (neither has a score of 10)" in verdict.sentence


def test_records_that_one_arm_alone_lost_may_not_turn_what_is_seen() -> None:
    """Of 200 records the tuned arm has 8 more right; ten that it could not answer may have been wrong, all of them."""
    won = evaluated({"zero": 100}, tuned=108, count=200, failed={"tuned": range(195, 200)})
    assert verdict_of(won).outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    turned = evaluated({"zero": 100}, tuned=108, count=200, failed={"tuned": range(190, 200)})
    assert primary(turned).verdict == VERDICT_BETTER, "of those that are left it is better for sure"
    verdict = verdict_of(turned)
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert verdict.sentence.startswith(
        "Inconclusive: tuned and zero have 190 of 200 records in common on exact_match (tuned alone has no score of "
        "10): +4.2 pp ["
    )
    assert verdict.sentence.endswith("] of those may be anything from -1.0 pp to +9.0 pp of all.")
    shared = range(190, 200)
    alike = evaluated({"zero": 100}, tuned=108, count=200, failed={"tuned": shared, "zero": shared})
    assert verdict_of(alike).outcome == Outcome.OUTCOME_FINE_TUNE_WINS, "neither has an advantage of them"


@pytest.mark.parametrize(
    ("value", "smallest", "shown"),
    [
        (0.10, 0.0, Relation.BETTER),
        (-0.10, 0.0, Relation.WORSE),
        (0.005, 0.10, Relation.ALIKE),
        (-0.05, 0.05, Relation.NOT_BETTER),
    ],
)
def test_no_relation_outlives_losses_that_could_turn_it(
    value: float, smallest: float, shown: Relation
) -> None:
    def advantage(lost: Losses, *, is_share: bool = True) -> Advantage:
        half = 0.08 if shown is Relation.NOT_BETTER else 0.04
        return Advantage(
            rival="zero",
            value=value,
            lower=value - half,
            upper=value + half,
            count=90,
            confidence=0.95,
            is_share=is_share,
            tells=True,
            losses=lost,
        )

    assert advantage(Losses()).relation(smallest) is shown
    assert advantage(Losses(baseline=1)).relation(smallest) is shown
    for lost in (Losses(baseline=10), Losses(candidate=10), Losses(candidate=5, baseline=5)):
        assert advantage(lost).relation(smallest) is Relation.OPEN
        assert advantage(lost, is_share=False).relation(smallest) is shown, "how far numbers go nobody knows"
    assert advantage(Losses(both=10)).relation(smallest) is shown


@pytest.mark.parametrize(
    ("value", "smallest", "lost", "found"),
    [
        # Alike, then from -14.5 pp to +5.5 pp: not better by 10 pp. The same on the other side says nothing.
        (-0.05, 0.10, Losses(baseline=10), Relation.NOT_BETTER),
        (0.05, 0.10, Losses(baseline=10), Relation.OPEN),
        # Worse, then from -15.4 pp to +4.6 pp: not better by 10 pp, and nothing where it matters from 4 pp on.
        (-0.06, 0.10, Losses(candidate=10), Relation.NOT_BETTER),
        (-0.06, 0.04, Losses(candidate=10), Relation.OPEN),
        (-0.06, 0.0, Losses(candidate=10), Relation.OPEN),
        # Alike, then from +1.0 pp to +9.5 pp: what is lost makes no win of no difference.
        (0.055, 0.0951, Losses(candidate=4), Relation.OPEN),
    ],
)
def test_of_what_losses_turn_the_weaker_relation_stands(
    value: float, smallest: float, lost: Losses, found: Relation
) -> None:
    seen = Advantage(
        rival="zero",
        value=value,
        lower=value - 0.04,
        upper=value + 0.04,
        count=90,
        confidence=0.95,
        is_share=True,
        tells=True,
        losses=lost,
    )
    assert seen.shown(smallest) in (Relation.ALIKE, Relation.WORSE)
    assert seen.relation(smallest) is found


@pytest.mark.parametrize(("num_failed", "is_warned"), [(0, False), (4, False), (5, True), (30, True)])
def test_people_are_warned_where_more_than_one_in_fifty_is_lost(num_failed: int, is_warned: bool) -> None:
    evaluation = evaluated({"zero": 0}, tuned=100, count=200, failed={"zero": range(200 - num_failed, 200)})
    warnings = list(loss_warnings(evaluation))
    assert warnings == (
        [
            f"tuned and zero have {200 - num_failed} of 200 records in common on exact_match (zero alone has no score "
            f"of {num_failed}): what they show is true of all as far as the others are like them"
        ]
        if is_warned
        else []
    )


@pytest.mark.parametrize("is_share", [True, False])
def test_no_record_at_all_settles_nothing(is_share: bool) -> None:
    """No worker of ours says so; one that does is not believed, and stops nobody from reading the evaluation."""
    evaluation = evaluated({"zero": 0}, tuned=30, count=48)
    evaluation.comparisons[0].count = 0
    if not is_share:
        evaluation.comparisons[0].kind = SCORE_KIND_REAL
    (found,) = advantages(evaluation, "exact_match")
    assert found.shown(0) is Relation.BETTER
    assert found.relation(0) is Relation.OPEN
    assert verdict_of(evaluation).outcome == Outcome.OUTCOME_INCONCLUSIVE


def test_an_arm_that_fails_leaves_the_other_comparisons_alone() -> None:
    evaluation = evaluated({"zero": 30, "few": 0}, tuned=10, count=48, failed={"few": range(20, 48)})
    verdict = verdict_of(evaluation)
    assert (verdict.outcome, verdict.rival_arm_id) == (Outcome.OUTCOME_PROMPTING_SUFFICES, "zero")
    won = verdict_of(evaluated({"zero": 0, "few": 0}, tuned=30, count=48, failed={"few": range(20, 48)}))
    assert (won.outcome, won.rival_arm_id) == (Outcome.OUTCOME_INCONCLUSIVE, "few"), "a win is over every one"


@pytest.mark.parametrize(
    ("num_failed", "max_loss", "right", "standing"),
    [
        (0, 0.03, 200, GuardResult.STANDING_HELD),
        (4, 0.03, 200, GuardResult.STANDING_HELD),
        (10, 0.03, 200, GuardResult.STANDING_UNDECIDED),
        (30, 0.9, 200, GuardResult.STANDING_UNDECIDED),
        (0, 0.37, 100, GuardResult.STANDING_BROKEN),
        (15, 0.37, 100, GuardResult.STANDING_UNDECIDED),
    ],
)
def test_a_guard_is_neither_held_nor_broken_by_what_is_left(
    num_failed: int, max_loss: float, right: int, standing: GuardResult.Standing.ValueType
) -> None:
    guard = Guard(score=ScoreGuard(score="field_match.parsed", max_loss=max_loss))
    evaluation = evaluated(
        {"zero": 0},
        tuned=30,
        count=200,
        guards=[guard],
        parsed=(200, right),
        failed={"tuned": range(200 - num_failed, 200)},
    )
    (result,) = verdict_of(evaluation).guards
    assert result.standing == standing
    if num_failed and standing == GuardResult.STANDING_UNDECIDED:
        assert (
            f"on {200 - num_failed} of 200 records (tuned alone has no score of {num_failed})"
            in result.sentence
        )


def former(
    *, tuned: int, count: int, failed: Mapping[str, range], asked: int | None = None, learnt: int = 0
) -> Evaluation:
    """Return what former versions stored: how many records each arm failed on, and not which a comparison lost.

    Of `asked` records `count` are compared, and `learnt` are of those that tuned models learnt from.
    """
    found = evaluated({"zero": 0}, tuned=tuned, count=count, failed=failed)
    for one in found.comparisons:
        for field in ("num_lost_candidate", "num_lost_baseline", "num_lost_both"):
            one.ClearField(field)
        one.verdict = VERDICT_BETTER
    found.num_records = asked or count
    found.contamination.num_exact = learnt
    found.verdict.CopyFrom(verdict_of(found))
    assert found.verdict.outcome == Outcome.OUTCOME_FINE_TUNE_WINS
    return found


def test_gates_do_not_believe_what_former_versions_settled_on_what_was_left() -> None:
    stored = former(tuned=20, count=48, failed={"zero": range(28, 48)})
    assert verdict_now(stored).outcome == Outcome.OUTCOME_INCONCLUSIVE
    for arm in stored.arm_results:
        arm.num_errors = 0
    assert verdict_now(stored) == stored.verdict


def test_gates_do_not_believe_a_former_verdict_of_two_arms_that_failed_on_other_records() -> None:
    """Each answered 91 of 100, which is enough, and they have 82 in common, which is not."""
    stored = former(tuned=60, count=100, failed={"zero": range(82, 91), "tuned": range(91, 100)})
    verdict = verdict_now(stored)
    assert verdict.outcome == Outcome.OUTCOME_INCONCLUSIVE
    assert "82 of 100 records in common on exact_match" in verdict.sentence
    assert "(tuned alone has no score of 9, zero alone has no score of 9)" in verdict.sentence


def test_records_that_tuned_models_learnt_from_are_no_former_loss() -> None:
    """Of 100 records 15 are learnt from; the twelve that an arm failed on are among these, or seven of them."""
    stored = former(tuned=60, count=85, failed={}, asked=100, learnt=15)
    stored.arm_results[0].num_errors = 12
    assert with_former_losses(stored) is stored
    assert verdict_now(stored) == stored.verdict
    seven = former(tuned=60, count=85, failed={"zero": range(80, 85)}, asked=100, learnt=15)
    seven.arm_results[0].num_errors = 12
    assert losses_for(primary(with_former_losses(seven)), "tuned") == Losses(baseline=5)


def test_records_that_both_arms_failed_on_are_one_former_loss_each() -> None:
    """Six that both failed on, and six of the one alone: 100 were asked, and 88 are left."""
    stored = former(tuned=60, count=100, failed={"zero": range(88, 100), "tuned": range(94, 100)})
    assert losses_for(primary(with_former_losses(stored)), "tuned") == Losses(baseline=6, both=6)
    assert "88 of 100 records in common" in verdict_now(stored).sentence


def test_records_that_have_not_the_score_are_no_former_loss() -> None:
    """Another score of the two arms tells that they have more records in common."""
    stored = former(tuned=60, count=85, failed={}, asked=100)
    stored.arm_results[0].num_errors = 12
    assert with_former_losses(stored) is not stored
    stored.comparisons.add().CopyFrom(primary(stored))
    stored.comparisons[1].score, stored.comparisons[1].count, stored.comparisons[1].primary = (
        "chrf",
        100,
        False,
    )
    assert with_former_losses(stored) is stored


def test_only_what_a_score_is_of_can_be_lost() -> None:
    field = "field_match.field.colour"
    mine = [said(**{field: 1.0}), said(), FAILED, FAILED, said(**{field: 1.0}), said()]
    other = [said(**{field: 0.0}), said(), said(), FAILED, FAILED, said(**{field: 1.0})]
    # Both have it; neither record has the field, answered or not; nobody knows; one failed; one was not graded.
    assert losses_of(mine, other, "zero", field) == Losses(candidate=1, baseline=1, both=1)


@pytest.mark.parametrize("score", ["judge.fair", "grader.fair"])
def test_what_a_judge_or_grader_gave_neither_is_lost(score: str) -> None:
    mine = [said(**{score: 1.0}), said(), said(), FAILED]
    other = [said(**{score: 0.0}), said(), FAILED, said(**{score: 0.0})]
    assert losses_of(mine, other, "zero", score) == Losses(candidate=1, both=2)


def test_what_is_lost_to_arms_and_to_a_judge_is_one_sum() -> None:
    """Of a hundred records an arm failed on six, and the judge on six others: 88 have both, which tells nothing."""

    def judged(row: int, lost: range, value: float) -> Answer:
        return FAILED if row in lost else said(**({} if row < 6 else {"judge.fair": value}))

    evaluation = evaluated({"zero": 0}, tuned=0, count=0)
    evaluation.primary_score = "judge.fair"
    answers = {
        "zero": [judged(row, range(94, 100), 0.1) for row in range(100)],
        "tuned": [judged(row, range(0), 0.9 if row % 2 else 0.8) for row in range(100)],
    }
    (found,) = comparisons_of(evaluation, answers)
    assert (found.count, found.num_lost_baseline, found.num_lost_both) == (88, 6, 6)
    assert found.verdict == VERDICT_INSUFFICIENT_EVIDENCE


@pytest.mark.parametrize("score", [PERPLEXITY, BITS_PER_BYTE])
def test_a_reference_that_fits_behind_one_prompt_alone_is_lost(score: str) -> None:
    measured = Answer(text="", finish_reason="STOP", scores={}, nll=1.0, num_tokens=3, num_bytes=9)
    unread = said()
    assert losses_of([measured, measured, unread], [measured, unread, unread], "zero", score) == Losses(
        baseline=1
    )


def test_judgements_of_pairs_are_lost_with_the_answers_and_by_the_judge() -> None:
    """What a judge did not say of two answers is lost to both, though it may have held them against a third."""
    judged, of_another = (
        Answer(text="", finish_reason="STOP", scores={"judge.fair": 1.0}, points={"judge.fair": {rival: 1.0}})
        for rival in ("zero", "few")
    )
    mine = [judged, FAILED, said(), judged, of_another, FAILED]
    other = [said(), said(), said(), FAILED, said(), FAILED]
    assert losses_of(mine, other, "zero", "judge.fair") == Losses(candidate=1, baseline=1, both=3)


def test_the_words_name_each_arm_that_lost() -> None:
    lost = Losses(candidate=1200, baseline=2, both=3)
    assert common_words(5, lost, "tuned", "few", "chrf") == (
        "tuned and few have 5 of 1,210 records in common on chrf (tuned alone has no score of 1,200, few alone has no "
        "score of 2, neither has a score of 3)"
    )
