"""Whether what arms, judges and graders gave is enough to tell anything: one rule for verdicts, guards and gates.

What is missing is not missing at random: an arm fails on the records that do not fit behind its examples, a judge on
long answers or on those that confuse it, a service that dies leaves the arms ungraded that came last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from luthier.grading.metrics.scores import GRADED, JUDGED
from luthier.v1.evaluation_pb2 import ArmResult, Comparison, Evaluation
from luthier.v1.judge_pb2 import JudgedPair, JudgeResult

LEAST_GIVEN = 0.9
"""Share of the answers, judgements or grades asked for that must have come for their score to tell anything."""
WHOLE = 0.98
"""Share of the records common to two arms below which people are warned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Records that a comparison of two arms lost, though the score is of them: how many, by whose score there is not.

    Attributes:
        candidate: the candidate's alone.
        baseline: the baseline's alone.
        both: neither arm has a score, as neither could answer, or as a judge or grader gave neither any.
    """

    candidate: int = 0
    baseline: int = 0
    both: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.candidate + self.baseline + self.both

    @property
    def one_sided(self) -> int:
        """Those that one arm alone has no score of: what they take away may be for it or against it."""
        return self.candidate + self.baseline

    def words(self, candidate: str, baseline: str) -> str:
        """Return who lost how many, for people."""
        alone = ((candidate, self.candidate), (baseline, self.baseline))
        told = [f"{arm_id} alone has no score of {count:,}" for arm_id, count in alone if count]
        return ", ".join([*told, *([f"neither has a score of {self.both:,}"] if self.both else [])])


def is_whole_enough(count: int, lost: int, least: float = LEAST_GIVEN) -> bool:
    """Whether what is left of the records is enough to tell anything of all of them."""
    return count >= least * (count + lost)


def common_words(count: int, losses: Losses, candidate: str, baseline: str, score: str) -> str:
    """Return in words how many records of a score two arms have in common, and who lost the others."""
    return (
        f"{candidate} and {baseline} have {count:,} of {count + losses.total:,} records in common on {score} "
        f"({losses.words(candidate, baseline)})"
    )


def lacks_answers(evaluation: Evaluation, arm_id: str) -> str:
    """Return why no score of an arm tells anything, as it failed on too many records; empty where it does."""
    failed, asked = num_errors(evaluation, arm_id), evaluation.num_records
    if is_whole_enough(asked - failed, failed):
        return ""
    return (
        f"{arm_id} could not answer {failed:,} of {asked:,} records, and {LEAST_GIVEN:.0%} must be answered"
    )


def with_former_losses(evaluation: Evaluation) -> Evaluation:
    """Return a stored evaluation whose comparisons say what they lost, which former versions did not write down.

    Of these it is known how many records each arm failed on, and how many two arms have in common. Where these show
    no loss, or where losses are written down, it is returned as it is.
    """
    if any(_losses(one).total for one in evaluation.comparisons):
        return evaluation
    common: dict[tuple[str, str], int] = {}
    for one in evaluation.comparisons:
        arms = one.candidate_arm_id, one.baseline_arm_id
        # Not every record has every score: by one that most have more of them are known to have been answered.
        common[arms] = max(common.get(arms, 0), one.count)
    former = {arms: _former_losses(evaluation, arms, count) for arms, count in common.items()}
    if not any(losses.total for losses in former.values()):
        return evaluation
    filled = Evaluation()
    filled.CopyFrom(evaluation)
    for one in filled.comparisons:
        losses = former[one.candidate_arm_id, one.baseline_arm_id]
        one.num_lost_candidate, one.num_lost_baseline = losses.candidate, losses.baseline
        one.num_lost_both = losses.both
    return filled


def _former_losses(evaluation: Evaluation, arms: tuple[str, str], common: int) -> Losses:
    """Return what two arms lost that have so many records in common, by how many each failed on.

    What they failed on may be records that tuned models learnt from, which are none, or the same ones.
    """
    learnt = evaluation.contamination
    num_learnt = learnt.num_exact + learnt.num_normalised + learnt.num_ngram
    room = max(0, evaluation.num_records - num_learnt - common)
    mine, other = (num_errors(evaluation, arm_id) for arm_id in arms)
    both = min(mine, other, room, max(0, mine + other - room))
    candidate = min(mine - both, room - both)
    return Losses(candidate=candidate, baseline=min(other - both, room - both - candidate), both=both)


def losses_for(comparison: Comparison, candidate: str) -> Losses:
    """Return what a comparison lost, `candidate` being the arm that is looked at, whichever of its two that is."""
    found = _losses(comparison)
    if comparison.candidate_arm_id == candidate:
        return found
    return Losses(candidate=found.baseline, baseline=found.candidate, both=found.both)


def _losses(comparison: Comparison) -> Losses:
    return Losses(
        candidate=comparison.num_lost_candidate,
        baseline=comparison.num_lost_baseline,
        both=comparison.num_lost_both,
    )


def num_errors(evaluation: Evaluation, arm_id: str) -> int:
    """Return how many records an arm could not answer."""
    return sum(arm.num_errors for arm in evaluation.arm_results if arm.arm_id == arm_id)


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
        if not is_whole_enough(count.came, count.asked - count.came):
            words = f"{count.came:,} of {count.asked:,} {count.things} came of {count.whose}"
            return f"{words}, and {LEAST_GIVEN:.0%} must"
    return ""


def _counts(evaluation: Evaluation, score: str, arm_ids: frozenset[str]) -> Iterator[_Count]:
    for judge in evaluation.judge_results:
        if score == f"{JUDGED}{judge.judge_id}":
            came = judge.num_asked - judge.num_errors
            yield _Count(came=came, asked=judge.num_asked, things="judgements", whose=judge.judge_id)
            yield from _of_pairs(evaluation, judge, arm_ids)
            if not judge.pairs:
                yield from _of_arms(evaluation, score, arm_ids, "judgements", judge.judge_id)
    for grader in evaluation.grader_results:
        if score == f"{GRADED}{grader.name}":
            came = grader.num_graded - grader.num_errors
            yield _Count(came=came, asked=grader.num_graded, things="grades", whose=grader.name)
            yield from _of_arms(evaluation, score, arm_ids, "grades", grader.name)


def _of_pairs(evaluation: Evaluation, judge: JudgeResult, arm_ids: frozenset[str]) -> Iterator[_Count]:
    """Yield the count of each pair of arms of which both are looked at, or one is where only one is.

    Of two arms their comparison says what either lost. Where one is looked at alone, all that it answered is asked for:
    a judge is asked only where the rival answered too.
    """
    for pair in _pairs(evaluation, judge):
        if len(arm_ids & {pair.arm_id, pair.rival_arm_id}) == min(2, len(arm_ids)) > 0:
            came = _came(pair)
            unpaired = (
                sum(_unpaired(evaluation, pair, arm_id) for arm_id in arm_ids) if len(arm_ids) == 1 else 0
            )
            yield _Count(
                came=came,
                asked=came + pair.num_errors + unpaired,
                things="records judged in both orders",
                whose=f"{judge.judge_id} for {pair.arm_id} and {pair.rival_arm_id}",
            )


def _pairs(evaluation: Evaluation, judge: JudgeResult) -> Iterator[JudgedPair]:
    """Yield all pairs that a judge holds against each other, also those of which it was asked nothing."""
    yield from judge.pairs
    known = {pair.rival_arm_id for pair in judge.pairs}
    for one in evaluation.judges:
        if one.judge_id == judge.judge_id and one.HasField("pairwise"):
            mine = one.pairwise.arm_id
            rivals = (arm.arm_id for arm in evaluation.arms if arm.arm_id not in {mine, *known})
            yield from (JudgedPair(arm_id=mine, rival_arm_id=rival) for rival in rivals)


def _unpaired(evaluation: Evaluation, pair: JudgedPair, arm_id: str) -> int:
    """Return how many records an arm of a pair answered and the other did not."""
    answered = evaluation.num_records - num_errors(evaluation, arm_id)
    return max(0, answered - _came(pair) - pair.num_errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalLosses:
    """What a score against other arms lacks, as these could not answer: the arm itself could.

    Attributes:
        total: records, once for each arm that could not answer one.
        records: records that count in the score not at all, as no rival answered.
        parts: of those that count by the rivals that did answer, the parts that are missing, in records.
    """

    total: int = 0
    records: float = 0.0
    parts: float = 0.0


def rival_losses(evaluation: Evaluation, arm_id: str, score: str) -> RivalLosses:
    """Return what an arm's score lacks as other arms could not answer; nothing unless a judge of pairs gave it.

    A record counts once, by the mean over the rivals that answered it.
    """
    for judge in evaluation.judge_results:
        pairs = [pair for pair in _pairs(evaluation, judge) if arm_id in (pair.arm_id, pair.rival_arm_id)]
        if score == f"{JUDGED}{judge.judge_id}" and pairs:
            total = sum(_unpaired(evaluation, pair, arm_id) for pair in pairs)
            # How the losses of several rivals meet is not told: what the judge's own failures may explain is no record.
            judged = sum(_num_scored(arm, score) for arm in evaluation.arm_results if arm.arm_id == arm_id)
            unjudged = evaluation.num_records - num_errors(evaluation, arm_id) - judged
            unjudged -= sum(pair.num_errors for pair in pairs)
            records = min(total / len(pairs), max(0, unjudged))
            return RivalLosses(total=total, records=records, parts=total / len(pairs) - records)
    return RivalLosses()


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
