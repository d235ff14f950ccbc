"""Gates on a judge of pairs: what the other arm could not answer opens none."""

from __future__ import annotations

import pytest
from tests.evaluation.gated import BASE, MODEL, alias, blocked, least, scored

from luthier.evaluation.aliases.rules import moved
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.judge_pb2 import JudgedPair, JudgeResult
from luthier.v1.model_alias_pb2 import Gate, ScoreGate


def held_against(count: int, *pairs: JudgedPair) -> Evaluation:
    """Return an evaluation of 48 records whose tuned arm a judge held against others on `count`, and won 0.9."""
    found = scored("judge.fair", count)
    found.num_records = 48
    found.judge_results.append(JudgeResult(judge_id="fair", num_asked=2 * count, pairs=pairs))
    return found


def pair(rival: str, came: int, num_errors: int = 0) -> JudgedPair:
    return JudgedPair(arm_id="tuned", rival_arm_id=rival, num_wins=came, num_errors=num_errors)


def test_records_that_a_rival_left_open_no_gate_on_a_judge_of_pairs() -> None:
    """The rival fails on 37 of 48, so that the judge is asked of 11, and answers them all."""
    gate = least("judge.fair", 0.6)
    said = "11 of 48 records judged in both orders came of fair for tuned and few, and 90% must"
    assert said in blocked(held_against(11, pair("few", 11)), gate)
    assert said in blocked(held_against(48, pair("zero", 48), pair("few", 11)), gate), (
        "another rival answered"
    )
    assert (
        moved(alias(gate), MODEL, held_against(48, pair("zero", 48), pair("few", 44))).current.gates[0].open
    )


def test_a_rival_that_answered_nothing_opens_no_gate_on_a_judge_of_pairs() -> None:
    found = held_against(48, pair("zero", 48))
    found.arms.add(arm_id="few", model=BASE)
    found.judges.add(judge_id="fair").pairwise.arm_id = "tuned"
    said = "0 of 48 records judged in both orders came of fair for tuned and few, and 90% must"
    assert said in blocked(found, least("judge.fair", 0.6))
    assert said in blocked(found, Gate(score=ScoreGate(score="judge.fair", most=1)))
    del found.arms[-1]
    assert moved(alias(least("judge.fair", 0.6)), MODEL, found).current.gates[0].open


@pytest.mark.parametrize(
    ("count", "pairs", "worst"),
    [
        # 0.9 of 44, of 48.
        (44, [pair("few", 44)], 0.825),
        # 0.9 of 48 less half of four, as the records count by the other rival: what they showed may all be its.
        (48, [pair("zero", 48), pair("few", 44)], 0.9 - 2 / 48),
        # Both lost the same four records.
        (44, [pair("zero", 44), pair("few", 44)], 0.825),
        # Four of the 48 have no judgement by the judge's own fault, which is no loss to a rival.
        (44, [pair("few", 44, num_errors=4)], 0.9),
    ],
)
def test_what_a_rival_could_not_answer_counts_as_the_worst(
    count: int, pairs: list[JudgedPair], worst: float
) -> None:
    found = held_against(count, *pairs)
    assert moved(alias(least("judge.fair", worst - 1e-6)), MODEL, found).current.gates[0].open
    if worst < 0.9:
        said = blocked(found, least("judge.fair", worst + 1e-6))
        assert "that those it is held against could not answer it may be " in said
        best = Gate(score=ScoreGate(score="judge.fair", most=0.9 + (0.9 - worst) / 9 - 1e-6))
        assert "that those it is held against could not answer it may be" in blocked(found, best)


def test_records_that_were_learnt_from_are_none_that_a_rival_left() -> None:
    """A rival failed on four: all may be among the 24 that were not learnt from, whose score the gate asks."""
    found = held_against(48, pair("zero", 48), pair("few", 44))
    clean = found.contamination.clean.add(arm_id="tuned", scores=found.arm_results[1].scores)
    clean.scores[-1].count = 24
    worst = 0.9 - 2 / 24
    assert moved(alias(least("judge.fair", worst - 1e-6)), MODEL, found).current.gates[0].open
    assert "could not answer it may be " in blocked(found, least("judge.fair", worst + 1e-6))
