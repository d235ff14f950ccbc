"""Whether what judges and graders gave is enough to tell anything: one rule for verdicts, guards and gates.

What is missing is not missing at random: a judge fails on long answers or on those that confuse it, a service that dies
leaves the arms ungraded that came last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from luthier.grading.metrics.scores import GRADED, JUDGED
from luthier.v1.evaluation_pb2 import ArmResult, Evaluation
from luthier.v1.judge_pb2 import JudgedPair, JudgeResult

LEAST_GIVEN = 0.9
"""Share of the judgements or grades asked for that must have come for their score to tell anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    """How many of those asked for came. `whose`: what gave them, and to whom; `things`: what they are."""

    came: int
    asked: int
    things: str
    whose: str


def lacks_assessments(evaluation: Evaluation, score: str, arm_ids: Iterable[str] = ()) -> str:
    """Return why the score of a judge or of a grader tells nothing; empty where it does, or is no such score.

    Too few came of it altogether, or of one of the arms that are looked at: ten arms of which one has no grade have
    90 % of them.
    """
    for count in _counts(evaluation, score, frozenset(arm_ids)):
        if count.came < LEAST_GIVEN * count.asked:
            words = f"{count.came:,} of {count.asked:,} {count.things} came of {count.whose}"
            return f"{words}, and {LEAST_GIVEN:.0%} must"
    return ""


def _counts(evaluation: Evaluation, score: str, arm_ids: frozenset[str]) -> Iterator[_Count]:
    for judge in evaluation.judge_results:
        if score == f"{JUDGED}{judge.judge_id}":
            came = judge.num_asked - judge.num_errors
            yield _Count(came=came, asked=judge.num_asked, things="judgements", whose=judge.judge_id)
            yield from _of_pairs(judge, arm_ids)
            if not judge.pairs:
                yield from _of_arms(evaluation, score, arm_ids, "judgements", judge.judge_id)
    for grader in evaluation.grader_results:
        if score == f"{GRADED}{grader.name}":
            came = grader.num_graded - grader.num_errors
            yield _Count(came=came, asked=grader.num_graded, things="grades", whose=grader.name)
            yield from _of_arms(evaluation, score, arm_ids, "grades", grader.name)


def _of_pairs(judge: JudgeResult, arm_ids: frozenset[str]) -> Iterator[_Count]:
    """Yield the count of each pair of arms of which both are looked at, or one is where only one is."""
    for pair in judge.pairs:
        if len(arm_ids & {pair.arm_id, pair.rival_arm_id}) == min(2, len(arm_ids)) > 0:
            came = _came(pair)
            yield _Count(
                came=came,
                asked=came + pair.num_errors,
                things="records judged in both orders",
                whose=f"{judge.judge_id} for {pair.arm_id} and {pair.rival_arm_id}",
            )


def _came(pair: JudgedPair) -> int:
    return pair.num_wins + pair.num_ties + pair.num_losses


def _of_arms(
    evaluation: Evaluation, score: str, arm_ids: frozenset[str], things: str, name: str
) -> Iterator[_Count]:
    """Yield the count of each arm that is looked at; nothing where it is not known how many records were asked."""
    for arm in evaluation.arm_results:
        if arm.arm_id in arm_ids and evaluation.num_records:
            yield _Count(
                came=_num_scored(arm, score),
                asked=evaluation.num_records - arm.num_errors,
                things=things,
                whose=f"{name} for {arm.arm_id}",
            )


def _num_scored(arm: ArmResult, score: str) -> int:
    return next((one.count for one in arm.scores if one.score == score), 0)
