"""From judgements to scores: order is averaged out, contradictions are ties, what is missing counts in nothing."""

from __future__ import annotations

import pytest
from google.rpc import status_pb2

from luthier.errors import Failure, Reason
from luthier.errors.status import failure_to_status
from luthier.evaluation.worker.comparing import comparisons_of
from luthier.evaluation.worker.judged import Item, JudgeCost, Judged, judged_by
from luthier.evaluation.worker.scoring import Answer
from luthier.v1.evaluation_pb2 import FINISH_REASON_LENGTH, VERDICT_BETTER, Evaluation, EvaluationArm
from luthier.v1.judge_pb2 import Judge, JudgePreference, PairwiseJudging, RubricJudging
from luthier.worker.v1.task_pb2 import AnsweredRecord, JudgeSpending

PAIRS = Judge(judge_id="fair", pairwise=PairwiseJudging(arm_id="tuned"))
SPENT = JudgeSpending(num_calls=43, num_prompt_tokens=900, num_generated_tokens=30)
SCALE = Judge(judge_id="scale", rubric=RubricJudging(least=1, most=5))
AWAY = failure_to_status(Failure(code="UNAVAILABLE", reason=Reason.JUDGE_UNAVAILABLE, message="away"))


def pairs(
    *said: tuple[str | None, str | None], rival: str = "zero"
) -> tuple[list[Item], list[AnsweredRecord]]:
    """What was said to the pair of each row, in both orders; None: the judge was away."""
    items, records = [], []
    for row, orders in enumerate(said):
        for (first, second), text in zip((("tuned", rival), (rival, "tuned")), orders, strict=True):
            items.append(Item(row=row, arm_id=first, rival_arm_id=second, prompt=""))
            error = status_pb2.Status() if text is not None else AWAY
            records.append(AnsweredRecord(text=text or "", error=error if text is None else None))
    return items, records


@pytest.mark.parametrize(
    ("orders", "points"),
    [
        (("Better: A", "Better: B"), 1.0),
        (("Better: B", "Better: A"), 0.0),
        (("Better: A", "Better: A"), 0.5),
        (("Better: tie", "Better: tie"), 0.5),
        (("Better: A", "Better: tie"), 0.75),
        (("Better: tie", "Better: A"), 0.25),
        (("Better: A", None), None),
        (("Better: A", "who knows"), None),
    ],
)
def test_a_pair_has_the_mean_of_both_orders(
    orders: tuple[str | None, str | None], points: float | None
) -> None:
    found = judged_by(PAIRS, *pairs(orders), JudgeCost())
    if points is None:
        assert not found.scores
        assert found.results[0].pairs[0].num_errors == 1
        return
    assert found.scores["tuned", 0] == {"judge.fair": points}
    assert found.scores["zero", 0] == {"judge.fair": 1 - points}
    assert found.points["tuned", 0] == {"judge.fair": {"zero": points}}
    assert found.points["zero", 0] == {"judge.fair": {"tuned": 1 - points}}


def test_a_judge_that_takes_whatever_stands_first_decides_nothing_and_is_found_out() -> None:
    found = judged_by(
        PAIRS, *pairs(*[("Better: A", "Better: A")] * 20), JudgeCost(num_repeated_calls=3, spent=SPENT)
    )
    (result,) = found.results
    assert (result.agreement.value, result.position_bias.value) == (0.0, 1.0)
    assert result.agreement.upper < 0.2
    assert result.position_bias.lower > 0.5
    (told,) = result.pairs
    assert (told.num_wins, told.num_ties, told.num_losses, told.num_contradictions) == (0, 20, 0, 20)
    assert result.num_repeated_calls == 3
    assert (result.num_calls, result.num_prompt_tokens, result.num_generated_tokens) == (43, 900, 30)
    assert {points["judge.fair"] for points in found.scores.values()} == {0.5}


def test_a_judge_that_does_not_mind_the_order_has_no_bias() -> None:
    said = (
        [("Better: A", "Better: B")] * 12
        + [("Better: B", "Better: A")] * 6
        + [("Better: tie", "Better: tie")] * 2
    )
    (result,) = judged_by(PAIRS, *pairs(*said), JudgeCost()).results
    assert (result.agreement.value, result.agreement.count) == (1.0, 20)
    assert result.position_bias.value == 0.0
    assert result.position_bias.lower < 0 < result.position_bias.upper
    (told,) = result.pairs
    assert (told.num_wins, told.num_ties, told.num_losses, told.num_contradictions) == (12, 2, 6, 0)


def test_rivals_of_a_record_do_not_make_a_judge_surer() -> None:
    said = [("Better: A", "Better: B")] * 12 + [("Better: A", "Better: A")] * 8
    (alone,) = judged_by(PAIRS, *pairs(*said), JudgeCost()).results
    parts = [pairs(*said, rival=rival) for rival in ("zero", "few", "many")]
    items = [one for part in parts for one in part[0]]
    records = [one for part in parts for one in part[1]]
    (three,) = judged_by(PAIRS, items, records, JudgeCost()).results
    assert (three.agreement, three.position_bias) == (alone.agreement, alone.position_bias)
    assert three.agreement.count == 20
    assert (alone.agreement.lower, alone.agreement.upper) == pytest.approx((0.3866, 0.7812), abs=1e-4)


def test_errors_are_counted_by_their_reasons_and_said() -> None:
    said = [(None, None), ("no idea", "Better: A"), ("Better: A", "Better: B")]
    found = judged_by(PAIRS, *pairs(*said), JudgeCost())
    (result,) = found.results
    assert (result.num_asked, result.num_errors) == (6, 3)
    assert [(one.reason, one.count) for one in result.errors] == [
        ("JUDGE_UNAVAILABLE", 2),
        ("JUDGE_ANSWER_INVALID", 1),
    ]
    assert result.errors[0].first_message == "away"
    (warning,) = found.warnings
    assert warning.startswith(
        "judge fair gave no judgement 3 of 6 times (2 JUDGE_UNAVAILABLE, 1 JUDGE_ANSWER_INVALID), which count in no"
    )
    kinds = [one.WhichOneof("outcome") for row in range(3) for one in found.judgements[row]]
    assert kinds == ["error", "error", "error", "preference", "preference", "preference"]
    assert found.judgements[1][0].text == "no idea"
    assert found.judgements[2][1].preference == JudgePreference.JUDGE_PREFERENCE_SECOND
    assert sorted(row for _, row in found.scores) == [2, 2]


def test_a_judge_that_never_judged_has_no_agreement() -> None:
    (result,) = judged_by(PAIRS, *pairs((None, None)), JudgeCost()).results
    assert not result.HasField("agreement")
    assert not result.HasField("position_bias")


def test_a_scale_is_a_share_from_its_worst_to_its_best() -> None:
    texts = ["Score: 1", "Score: 4", "Score: 5", "Score: 9"]
    items = [Item(row=row, arm_id="zero", prompt="") for row in range(4)]
    found = judged_by(SCALE, items, [AnsweredRecord(text=text) for text in texts], JudgeCost())
    assert [found.scores.get(("zero", row)) for row in range(4)] == [
        {"judge.scale": 0.0},
        {"judge.scale": 0.75},
        {"judge.scale": 1.0},
        None,
    ]
    assert not found.points
    assert found.judgements[1][0].number == 4
    assert [(one.reason, one.count) for one in found.results[0].errors] == [("JUDGE_ANSWER_INVALID", 1)]


def test_a_judgement_that_was_cut_is_none() -> None:
    record = AnsweredRecord(text="It says:\nScore: 5", finish_reason=FINISH_REASON_LENGTH)
    judge = Judge(judge_id="scale", rubric=RubricJudging(least=1, most=5), max_new_tokens=8)
    found = judged_by(judge, [Item(row=0, arm_id="zero", prompt="")], [record], JudgeCost())
    assert not found.scores
    (told,) = found.results[0].errors
    assert told.reason == Reason.JUDGE_ANSWER_INVALID
    assert "must end within max_new_tokens, got more than 8" in told.first_message


def test_each_pair_of_arms_is_compared_by_its_own_points() -> None:
    """Against one arm it wins always, against the other never: the mean of both says nothing of either."""
    wins, losses = ("Better: A", "Better: B"), ("Better: B", "Better: A")
    parts = [
        judged_by(PAIRS, *pairs(*[said] * 20, rival=rival), JudgeCost())
        for said, rival in ((wins, "zero"), (losses, "few"))
    ]
    both = [Judged.joined([part]) for part in parts]
    points = {
        place: {
            "judge.fair": {**one.get("judge.fair", {}), **both[1].points.get(place, {}).get("judge.fair", {})}
        }
        for place, one in {**both[1].points, **both[0].points}.items()
    }
    answers = {
        arm_id: [
            Answer(
                text="",
                finish_reason="STOP",
                scores={"judge.fair": 0.5},
                points=points[arm_id, row],
            )
            for row in range(20)
        ]
        for arm_id in ("zero", "few", "tuned")
    }
    arms = [EvaluationArm(arm_id=arm_id, tuned=arm_id == "tuned") for arm_id in answers]
    evaluation = Evaluation(arms=arms, primary_score="judge.fair", candidate_arm_id="tuned")
    found = {(one.candidate_arm_id, one.baseline_arm_id): one for one in comparisons_of(evaluation, answers)}
    assert set(found) == {("tuned", "zero"), ("tuned", "few")}, "what no judge saw together is not compared"
    assert found["tuned", "zero"].difference == 1.0
    assert found["tuned", "zero"].verdict == VERDICT_BETTER
    assert found["tuned", "few"].difference == -1.0
    assert all(one.primary for one in found.values())
