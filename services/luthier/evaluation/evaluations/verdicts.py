"""The verdict of an evaluation: read off its comparisons, so that it cannot contradict them.

A comparison's interval leaves zero out exactly where its p-value says so, corrected for the comparisons beside it. The
candidate must be better than each prompting arm, so that no correction is needed for a win: all of them have to hold.
Of all other outcomes one prompting arm is enough: the intervals hold all truths together, in 95 % of evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from statistics import NormalDist

from luthier.evaluation.amounts import amount, is_alike, spread
from luthier.evaluation.completeness import (
    LEAST_GIVEN,
    Losses,
    common_words,
    is_whole_enough,
    lacks_assessments,
    losses_for,
    with_former_losses,
)
from luthier.evaluation.evaluations.drift_rules import drift_guarded, retained_words
from luthier.evaluation.evaluations.telling import blind_scores, blind_words
from luthier.v1.evaluation_pb2 import (
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_REAL,
    VERDICT_INSUFFICIENT_EVIDENCE,
    Comparison,
    Evaluation,
)
from luthier.v1.verdict_pb2 import EvaluationVerdict, Guard, GuardResult, ScoreGuard

CONFIDENCE = 0.95
POWER = 0.8
LEAST_RECORDS = 10
"""Below it nothing is said, however clear."""
_MOST_RECORDS = 10**9
Outcome = EvaluationVerdict.Outcome
Standing = GuardResult.Standing


class Relation(Enum):
    """What a comparison shows of the candidate."""

    BETTER = auto()
    WORSE = auto()
    ALIKE = auto()
    NOT_BETTER = auto()
    OPEN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantage:
    """By how much the candidate is better than another arm, whichever direction the score has.

    `tells`: whether it may settle anything. Too few records do not, nor does an interval that nobody knows.
    `losses`: records that it lacks, the candidate's as such.
    """

    rival: str
    value: float
    lower: float
    upper: float
    count: int
    confidence: float
    is_share: bool
    tells: bool
    losses: Losses = field(default_factory=Losses)

    @property
    def is_bounded(self) -> bool:
        """Whether its interval is known: both bounds are alike where numbers do not scatter."""
        return self.lower < self.upper

    @property
    def words(self) -> str:
        """The advantage with its interval, for people."""
        known = self.is_bounded
        bounds = spread(self.lower, self.upper, is_share=self.is_share) if known else "(interval not known)"
        return f"{amount(self.value, is_share=self.is_share, signed=True)} {bounds}"

    @property
    def records(self) -> str:
        """The records that it is of, for people: `45 records`, or `45 of 48 records` where some are lost."""
        lost = self.losses.total
        return f"{self.count:,} of {self.count + lost:,} records" if lost else f"{self.count:,} records"

    @property
    def extremes(self) -> tuple[float, float]:
        """What it would be were all records that one arm alone lost against the candidate, and were all for it.

        Of shares: how far numbers go nobody knows, and what neither arm has a score of tells them not apart. Of no
        record it may be anything.
        """
        lost = self.losses.one_sided if self.is_share else 0
        whole = self.count + lost
        if not whole:
            return -math.inf, math.inf
        return (self.value * self.count - lost) / whole, (self.value * self.count + lost) / whole

    def relation(self, smallest: float) -> Relation:
        """Return what it shows where only a difference of `smallest` (0: any) matters, unless what is lost turns it.

        What is no longer alike, or worse, may be known not to be better by so much. It is not called better: what is
        lost must not win where what is there shows no difference that matters.
        """
        shown = self.shown(smallest)
        low, high = self.extremes
        stands = {
            Relation.BETTER: low > 0,
            Relation.WORSE: high < 0,
            Relation.ALIKE: is_alike(low, high, smallest),
            Relation.NOT_BETTER: high < smallest,
        }
        if stands.get(shown, True):
            return shown
        is_below = smallest > 0 and self.upper < smallest and stands[Relation.NOT_BETTER]
        return Relation.NOT_BETTER if is_below else Relation.OPEN

    def shown(self, smallest: float) -> Relation:
        """Return what the records show that it has."""
        if not self.tells:
            return Relation.OPEN
        if is_alike(self.lower, self.upper, smallest):
            return Relation.ALIKE
        if self.lower > 0:
            return Relation.BETTER
        if self.upper < 0:
            return Relation.WORSE
        return Relation.NOT_BETTER if smallest and self.upper < smallest else Relation.OPEN


def verdict_of(evaluation: Evaluation) -> EvaluationVerdict:
    """Return the verdict of an evaluation that has its results.

    Where drift was measured its sentence says what the candidate retains, guard or none: a win that forgot all else is
    not told without it.
    """
    verdict = _decided(evaluation)
    retained = retained_words(evaluation)
    is_told = any(one.sentence in verdict.sentence for one in verdict.guards if one.guard.HasField("drift"))
    if retained and not is_told:
        verdict.sentence = f"{verdict.sentence[:-1]}; {retained}."
    return verdict


def _decided(evaluation: Evaluation) -> EvaluationVerdict:
    prompting = [arm.arm_id for arm in evaluation.arms if not arm.tuned]
    candidate = evaluation.candidate_arm_id
    if not candidate or not prompting:
        missing = "tuned arm" if not candidate else "prompting arm"
        return EvaluationVerdict(sentence=f"No verdict: there is no {missing} to hold against the others.")
    found = {one.rival: one for one in advantages(evaluation, evaluation.primary_score)}
    rivals = [found[arm_id] for arm_id in prompting if arm_id in found]
    lost = lacks_assessments(evaluation, evaluation.primary_score, [candidate, *prompting])
    if lost:
        verdict = EvaluationVerdict(outcome=Outcome.OUTCOME_INCONCLUSIVE, sentence=f"Inconclusive: {lost}.")
    else:
        verdict = _judged(evaluation, rivals, len(prompting))
    verdict.score = evaluation.primary_score
    verdict.candidate_arm_id = candidate
    verdict.prompting_arm_ids.extend(prompting)
    verdict.guards.extend(_guarded(evaluation, guard, prompting) for guard in evaluation.guards)
    broken = [result for result in verdict.guards if result.standing == Standing.STANDING_BROKEN]
    open_guards = [result for result in verdict.guards if result.standing == Standing.STANDING_UNDECIDED]
    if broken:
        verdict.outcome = Outcome.OUTCOME_REGRESSED
        verdict.sentence = f"Regressed: {broken[0].sentence}."
        verdict.num_records_to_settle = 0
    elif open_guards:
        verdict.sentence = f"{verdict.sentence[:-1]}; not settled: {open_guards[0].sentence}."
    return verdict


def verdict_now(evaluation: Evaluation) -> EvaluationVerdict:
    """Return the verdict of a stored evaluation, for gates.

    Former versions settled verdicts and guards on differences without an interval, and on what records were left where
    arms failed: these are read anew.
    """
    stored, filled = evaluation.verdict, with_former_losses(evaluation)
    scores = {stored.score, *(one.guard.score.score for one in stored.guards)}
    known = all(one.is_bounded for score in scores for one in advantages(evaluation, score))
    return stored if known and filled is evaluation else verdict_of(filled)


def advantages(evaluation: Evaluation, score: str) -> Iterator[Advantage]:
    """Yield the candidate's advantage over each other arm on a score, as far as there are comparisons."""
    candidate = evaluation.candidate_arm_id
    for one in evaluation.comparisons:
        if one.score == score and candidate in (one.candidate_arm_id, one.baseline_arm_id):
            yield _advantage(one, candidate)


def records_to_settle(advantage: Advantage, smallest: float) -> int:
    """Return about how many records would settle a comparison, at the difference seen, 4 times in 5; 0: nobody can say.

    The error falls with the root of the records. Where a smallest difference is given, showing that there is none of it
    may take fewer than showing which arm is better.
    """
    standard = NormalDist()
    width = advantage.upper - advantage.lower
    if not math.isfinite(width):
        return LEAST_RECORDS
    error = width / 2 / standard.inv_cdf((1 + advantage.confidence) / 2)
    reach = standard.inv_cdf((1 + CONFIDENCE) / 2) + standard.inv_cdf(POWER)
    distances = [abs(advantage.value), smallest - abs(advantage.value)]
    best = max(distances)
    if best <= 0 or error == 0:
        return LEAST_RECORDS if advantage.count < LEAST_RECORDS else 0
    wanted = advantage.count * (reach * error / best) ** 2
    return max(LEAST_RECORDS, advantage.count + 1, math.ceil(min(wanted, _MOST_RECORDS)))


def _judged(evaluation: Evaluation, rivals: Sequence[Advantage], num_prompting: int) -> EvaluationVerdict:
    candidate, score = evaluation.candidate_arm_id, evaluation.primary_score
    smallest = evaluation.smallest_difference
    by_relation: dict[Relation, list[Advantage]] = {relation: [] for relation in Relation}
    for one in rivals:
        by_relation[one.relation(smallest)].append(one)
    if better := by_relation[Relation.BETTER]:
        closest = min(better, key=lambda one: one.lower)
        if len(better) == num_prompting:
            than = (
                closest.rival if num_prompting == 1 else f"every prompting arm, {closest.rival} the closest,"
            )
            return _said(
                Outcome.OUTCOME_FINE_TUNE_WINS,
                closest,
                f"Fine-tuning wins: {candidate} is better than {than} on {score}",
            )
    if worse := by_relation[Relation.WORSE]:
        best = min(worse, key=lambda one: one.upper)
        return _said(
            Outcome.OUTCOME_PROMPTING_SUFFICES,
            best,
            f"Prompting suffices: {candidate} is worse than {best.rival} on {score}",
        )
    limit = amount(smallest, is_share=bool(rivals) and rivals[0].is_share)
    if not_better := by_relation[Relation.NOT_BETTER]:
        best = min(not_better, key=lambda one: one.upper)
        return _said(
            Outcome.OUTCOME_PROMPTING_SUFFICES,
            best,
            f"Prompting suffices: {candidate} is not better than {best.rival} by {limit} or more on {score}",
        )
    if alike := by_relation[Relation.ALIKE]:
        nearest = min(alike, key=lambda one: one.value)
        return _said(
            Outcome.OUTCOME_NO_DIFFERENCE,
            nearest,
            f"No difference that matters: {candidate} and {nearest.rival} differ by less than {limit} on {score}",
        )
    return _open(evaluation, by_relation[Relation.OPEN])


def _said(outcome: Outcome.ValueType, decider: Advantage, words: str) -> EvaluationVerdict:
    return EvaluationVerdict(
        outcome=outcome,
        rival_arm_id=decider.rival,
        sentence=f"{words}: {decider.words} on {decider.records}.",
    )


def _open(evaluation: Evaluation, unsettled: Sequence[Advantage]) -> EvaluationVerdict:
    candidate, score = evaluation.candidate_arm_id, evaluation.primary_score
    verdict = EvaluationVerdict(outcome=Outcome.OUTCOME_INCONCLUSIVE)
    if not unsettled:
        verdict.sentence = (
            f"Inconclusive: {candidate} and a prompting arm have no record with {score} in common."
        )
        return verdict
    blind = next((one for one in blind_scores(evaluation) if one.score == score), None)
    if blind is not None:
        verdict.rival_arm_id = unsettled[0].rival
        verdict.sentence = f"Inconclusive: {blind_words(evaluation, blind)}; choose another primary_score."
        return verdict
    for one in unsettled:
        if lost := _lost_words(candidate, score, one, evaluation.smallest_difference):
            verdict.rival_arm_id = one.rival
            verdict.sentence = f"Inconclusive: {lost}."
            return verdict
    wanted = {one.rival: records_to_settle(one, evaluation.smallest_difference) for one in unsettled}
    hardest = max(unsettled, key=lambda one: wanted[one.rival] or math.inf)
    verdict.rival_arm_id = hardest.rival
    verdict.num_records_to_settle = wanted[hardest.rival]
    verdict.sentence = (
        f"Inconclusive: {hardest.records} do not tell {candidate} from {hardest.rival} on {score}: "
        f"{hardest.words}; {_needed_words(hardest, wanted[hardest.rival])}."
    )
    return verdict


def _lost_words(candidate: str, score: str, one: Advantage, smallest: float) -> str:
    """Return how what was lost keeps a comparison from telling anything; empty where it is not that."""
    common = common_words(one.count, one.losses, candidate, one.rival, score)
    if not is_whole_enough(one.count, one.losses.total):
        return f"{common}, and {LEAST_GIVEN:.0%} must be: what is lost is not lost at random"
    if one.relation(smallest) == one.shown(smallest):
        return ""
    return f"{common}: {_turned_words(one)}"


def _turned_words(one: Advantage) -> str:
    low, high = (amount(value, is_share=one.is_share, signed=True) for value in one.extremes)
    return f"{one.words} of those may be anything from {low} to {high} of all"


def _needed_words(hardest: Advantage, num_records: int) -> str:
    if num_records:
        return f"about {num_records:,} would"
    if not hardest.is_bounded:
        return "they differ by as much on each or rest on one alone, which does not tell how far others lie"
    return "how many would depends on the smallest difference that matters, which is not given"


def _guarded(evaluation: Evaluation, guard: Guard, prompting: Sequence[str]) -> GuardResult:
    if guard.WhichOneof("guarded") == "drift":
        standing, sentence = drift_guarded(evaluation, guard.drift)
        return GuardResult(guard=guard, standing=standing, sentence=sentence)
    assert guard.WhichOneof("guarded") == "score", "the door refuses a guard of nothing"
    wanted = guard.score
    arms = [wanted.baseline_arm_id] if wanted.baseline_arm_id else prompting
    if lost := lacks_assessments(evaluation, wanted.score, [evaluation.candidate_arm_id, *arms]):
        return GuardResult(guard=guard, standing=Standing.STANDING_UNDECIDED, sentence=lost)
    found = {one.rival: one for one in advantages(evaluation, wanted.score)}
    results = [
        _score_guarded(evaluation.candidate_arm_id, wanted, found.get(arm_id), arm_id)
        for arm_id in arms
        if arm_id != evaluation.candidate_arm_id
    ]
    order = (Standing.STANDING_BROKEN, Standing.STANDING_UNDECIDED, Standing.STANDING_HELD)
    standing, sentence = min(results, key=lambda result: order.index(result[0]))
    return GuardResult(guard=guard, standing=standing, sentence=sentence)


def _score_guarded(
    candidate: str, guard: ScoreGuard, advantage: Advantage | None, arm_id: str
) -> tuple[Standing.ValueType, str]:
    if advantage is None:
        words = f"{candidate} and {arm_id} have no record with {guard.score} in common"
        return Standing.STANDING_UNDECIDED, words
    limit = amount(guard.max_loss, is_share=advantage.is_share)
    seen = f"against {arm_id} on {guard.score}: {advantage.words} on {advantage.records}"
    low, high = advantage.extremes
    if advantage.tells and max(advantage.upper, high) < -guard.max_loss:
        return Standing.STANDING_BROKEN, f"{candidate} loses more than {limit} {seen}"
    if advantage.tells and min(advantage.lower, low) >= -guard.max_loss:
        return Standing.STANDING_HELD, f"{candidate} loses at most {limit} {seen}"
    if advantage.losses.total:
        seen += f" ({advantage.losses.words(candidate, arm_id)})"
    return Standing.STANDING_UNDECIDED, f"{candidate} may lose more than {limit} {seen}"


def _advantage(one: Comparison, candidate: str) -> Advantage:
    is_turned = (one.candidate_arm_id != candidate) != (one.direction == SCORE_DIRECTION_LOWER_IS_BETTER)
    sign = -1.0 if is_turned else 1.0
    lower, upper = sorted((sign * one.lower, sign * one.upper))
    losses = losses_for(one, candidate)
    is_enough = one.verdict != VERDICT_INSUFFICIENT_EVIDENCE and is_whole_enough(one.count, losses.total)
    return Advantage(
        rival=one.baseline_arm_id if one.candidate_arm_id == candidate else one.candidate_arm_id,
        value=sign * one.difference,
        lower=lower,
        upper=upper,
        count=one.count,
        confidence=one.confidence or CONFIDENCE,
        is_share=one.kind != SCORE_KIND_REAL,
        tells=is_enough and one.lower < one.upper,
        losses=losses,
    )
