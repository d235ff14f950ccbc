"""From what judges said to scores of arms, and to what is known of the judges themselves."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from luthier.errors import Failure, Reason
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.grading.judging import read_number, read_preference
from luthier.grading.metrics.intervals import Interval, wilson_mean
from luthier.grading.metrics.paired import share_difference
from luthier.grading.metrics.scores import JUDGED
from luthier.grading.outcomes import CODES, GradingError
from luthier.v1.evaluation_pb2 import FINISH_REASON_LENGTH
from luthier.v1.judge_pb2 import (
    JUDGE_PREFERENCE_FIRST,
    JUDGE_PREFERENCE_SECOND,
    JUDGE_PREFERENCE_TIE,
    Judge,
    JudgedPair,
    JudgeErrors,
    JudgeEstimate,
    Judgement,
    JudgePreference,
    JudgeResult,
)
from luthier.worker.v1 import task_pb2

TEXT_CHARACTERS = 2000
_CONFIDENCE = 0.95
_MAX_REASONS = 16
_POINTS = {JUDGE_PREFERENCE_FIRST: 1.0, JUDGE_PREFERENCE_TIE: 0.5, JUDGE_PREFERENCE_SECOND: 0.0}
Scores = dict[tuple[str, int], dict[str, float]]
"""By arm and row."""
Orders = tuple[JudgePreference.ValueType, JudgePreference.ValueType]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What a judge is asked once: one arm's answer to a record, or two in one order."""

    row: int
    arm_id: str
    prompt: str
    rival_arm_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What came of judges.

    Attributes:
        scores: of an arm's answers.
        points: of an arm's answers against those of another arm, by arm, row, score and that arm.
        judgements: by row.
        results: what is known of each judge.
        warnings: for people.
    """

    scores: Mapping[tuple[str, int], Mapping[str, float]] = field(default_factory=dict)
    points: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    judgements: Mapping[int, Sequence[Judgement]] = field(default_factory=dict)
    results: Sequence[JudgeResult] = ()
    warnings: Sequence[str] = ()

    @staticmethod
    def joined(parts: Sequence[Judged]) -> Judged:
        """Return what came of several."""
        scores: Scores = defaultdict(dict)
        points: dict[tuple[str, int], dict[str, Mapping[str, float]]] = defaultdict(dict)
        judgements: dict[int, list[Judgement]] = defaultdict(list)
        for part in parts:
            for place, found in part.scores.items():
                scores[place].update(found)
            for place, by_score in part.points.items():
                points[place].update(by_score)
            for row, made in part.judgements.items():
                judgements[row].extend(made)
        return Judged(
            scores=dict(scores),
            points=dict(points),
            judgements=dict(judgements),
            results=[result for part in parts for result in part.results],
            warnings=[warning for part in parts for warning in part.warnings],
        )


NOBODY_JUDGED = Judged()


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCost:
    """What a judge cost.

    Attributes:
        num_repeated_calls: calls that failed and were made again, by this attempt.
        spent: calls and tokens of all attempts.
    """

    num_repeated_calls: int = 0
    spent: task_pb2.JudgeSpending = field(default_factory=task_pb2.JudgeSpending)


def judged_by(
    judge: Judge, items: Sequence[Item], said: Sequence[task_pb2.AnsweredRecord], cost: JudgeCost
) -> Judged:
    """Return what came of one judge; `said` is what it said to each of `items`."""
    made = [_judgement(judge, item, record) for item, record in zip(items, said, strict=True)]
    by_row: dict[int, list[Judgement]] = defaultdict(list)
    for item, one in zip(items, made, strict=True):
        by_row[item.row].append(one)
    result = JudgeResult(
        judge_id=judge.judge_id,
        num_asked=len(made),
        num_errors=sum(one.HasField("error") for one in made),
        num_repeated_calls=cost.num_repeated_calls,
        num_calls=cost.spent.num_calls,
        num_prompt_tokens=cost.spent.num_prompt_tokens,
        num_generated_tokens=cost.spent.num_generated_tokens,
        errors=_errors(made),
    )
    name = f"{JUDGED}{judge.judge_id}"
    if judge.HasField("rubric"):
        scores = _on_scale(judge, name, zip(items, made, strict=True))
        return Judged(scores=scores, judgements=by_row, results=[result], warnings=list(_warnings(result)))
    # Both orders of a pair stand beside each other.
    pairs = list(zip(items[::2], made[::2], made[1::2], strict=True))
    _tell_pairs(result, pairs)
    points = _pair_points(name, pairs)
    means = {place: {name: sum(found[name].values()) / len(found[name])} for place, found in points.items()}
    return Judged(
        scores=means,
        points=points,
        judgements=by_row,
        results=[result],
        warnings=list(_warnings(result)),
    )


def _judgement(judge: Judge, item: Item, record: task_pb2.AnsweredRecord) -> Judgement:
    one = Judgement(
        judge_id=judge.judge_id,
        arm_id=item.arm_id,
        rival_arm_id=item.rival_arm_id,
        text=record.text[:TEXT_CHARACTERS],
    )
    if record.HasField("error"):
        one.error.CopyFrom(record.error)
        return one
    try:
        if record.finish_reason == FINISH_REASON_LENGTH:
            # What it would have ended with is not known: a last line that is there is a quoted or a half one.
            words = f"what a judge says must end within max_new_tokens, got more than {judge.max_new_tokens}"
            raise GradingError(Reason.JUDGE_ANSWER_INVALID, words)
        if judge.HasField("rubric"):
            one.number = read_number(record.text, judge.rubric.least, judge.rubric.most)
        else:
            one.preference = JudgePreference.Value(f"JUDGE_PREFERENCE_{read_preference(record.text)}")
    except GradingError as error:
        failure = Failure(
            code=CODES[error.reason],
            reason=error.reason,
            message=f"judge {judge.judge_id}: {error.message}",
        )
        one.error.CopyFrom(failure_to_status(failure))
    return one


def _on_scale(judge: Judge, name: str, made: Iterable[tuple[Item, Judgement]]) -> Scores:
    least, most = judge.rubric.least, judge.rubric.most
    return {
        (item.arm_id, item.row): {name: (one.number - least) / (most - least)}
        for item, one in made
        if one.HasField("number")
    }


def _pair_points(
    name: str, pairs: Iterable[tuple[Item, Judgement, Judgement]]
) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """Return the points of each arm against each other one, by row; none of a pair that lacks an order."""
    points: dict[tuple[str, int], dict[str, dict[str, float]]] = defaultdict(lambda: {name: {}})
    for item, first, second in pairs:
        if _is_whole(first, second):
            mine = _points(first, second)
            points[item.arm_id, item.row][name][item.rival_arm_id] = mine
            points[item.rival_arm_id, item.row][name][item.arm_id] = 1 - mine
    return dict(points)


def _tell_pairs(result: JudgeResult, pairs: Sequence[tuple[Item, Judgement, Judgement]]) -> None:
    """Say in a result how the arms did, and how far its judge can be trusted."""
    by_arms: dict[tuple[str, str], JudgedPair] = {}
    for _, first, second in pairs:
        arms = (first.arm_id, first.rival_arm_id)
        told = by_arms.setdefault(arms, JudgedPair(arm_id=arms[0], rival_arm_id=arms[1]))
        _count(told, first, second)
    result.pairs.extend(by_arms.values())
    # Pairs of one record share an answer and a question, so that each record counts once, however many rivals it has.
    by_row: dict[int, list[Orders]] = defaultdict(list)
    for item, first, second in pairs:
        if _is_whole(first, second):
            by_row[item.row].append((first.preference, second.preference))
    if not by_row:
        return
    alike = [_mean(_POINTS[one] == 1 - _POINTS[other] for one, other in orders) for orders in by_row.values()]
    result.agreement.CopyFrom(_estimate(wilson_mean(alike)))
    shares = [
        [_mean(one.count(preference) / 2 for one in orders) for orders in by_row.values()]
        for preference in (JUDGE_PREFERENCE_FIRST, JUDGE_PREFERENCE_SECOND)
    ]
    bias = share_difference(*shares).interval(_CONFIDENCE)
    result.position_bias.CopyFrom(_estimate(bias))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _count(told: JudgedPair, first: Judgement, second: Judgement) -> None:
    if not _is_whole(first, second):
        told.num_errors += 1
        return
    mine = _points(first, second)
    told.num_wins += mine > 0.5
    told.num_losses += mine < 0.5
    told.num_ties += mine == 0.5
    told.num_contradictions += mine == 0.5 and first.preference != JUDGE_PREFERENCE_TIE


def _is_whole(first: Judgement, second: Judgement) -> bool:
    return first.HasField("preference") and second.HasField("preference")


def _points(first: Judgement, second: Judgement) -> float:
    """Return the points of the arm that stood first in the first order, and second in the other."""
    return (_POINTS[first.preference] + 1 - _POINTS[second.preference]) / 2


def _errors(made: Sequence[Judgement]) -> list[JudgeErrors]:
    failures = [status_to_failure(one.error) for one in made if one.HasField("error")]
    counts = Counter(failure.reason for failure in failures)
    firsts = {failure.reason: failure.message for failure in reversed(failures)}
    return [
        JudgeErrors(reason=reason, count=count, first_message=firsts[reason])
        for reason, count in counts.most_common(_MAX_REASONS)
    ]


def _warnings(result: JudgeResult) -> Iterator[str]:
    if result.num_errors:
        reasons = ", ".join(f"{one.count:,} {one.reason}" for one in result.errors)
        yield (
            f"judge {result.judge_id} gave no judgement {result.num_errors:,} of {result.num_asked:,} times "
            f"({reasons}), which count in no score; the first: {result.errors[0].first_message}"
        )


def _estimate(interval: Interval) -> JudgeEstimate:
    return JudgeEstimate(
        value=interval.value, lower=interval.lower, upper=interval.upper, count=interval.count
    )
