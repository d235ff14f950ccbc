"""Where two arms disagree: the records on which their scores, or where no score tells their answers, differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from luthier.client.scores import is_right, lower_is_better
from luthier.errors import InvalidArgument
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Prediction
from luthier.v1.judge_pb2 import JUDGE_PREFERENCE_FIRST, JUDGE_PREFERENCE_SECOND

Side = Literal["gained", "lost", "differs"]
_JUDGED = "judge."
_LEADS = {JUDGE_PREFERENCE_FIRST: 1.0, JUDGE_PREFERENCE_SECOND: -1.0}
SIDES: tuple[Side, ...] = ("gained", "lost", "differs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A record on which two arms disagree.

    `side`: `gained` where the candidate is better, `lost` where the baseline is, `differs` where no score says which.
    `gap`: how far their scores are apart, 0 where no score tells.
    """

    prediction: Prediction
    candidate: ArmPrediction
    baseline: ArmPrediction
    side: Side
    gap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Two arms, and the score that tells them apart; empty: whether the whole answer is right.

    `or_correctness`: where answers to a record lack the score, whether the whole answer is right tells in its place.
    `passed_over`: why the score of the verdict does not tell arms of two evaluations apart; empty where it may.
    """

    candidate: str
    baseline: str
    score: str = ""
    lower_is_better: bool = False
    or_correctness: bool = False
    passed_over: str = ""

    @property
    def told_by(self) -> str:
        """What tells the arms apart, in words."""
        return self.score or "whether the whole answer is right"


def contest_of(evaluation: Evaluation, candidate: str, baseline: str, score: str = "") -> Contest:
    """Return a contest between two arms of an evaluation.

    Without a score that of the verdict tells them apart; where there is none, whether the whole answer is right.
    Raises InvalidArgument for an arm or a score that it does not have.
    """
    arms = [arm.arm_id for arm in evaluation.arms]
    for arm_id in (candidate, baseline):
        if arm_id not in arms:
            raise InvalidArgument(f"the arm must be one of {', '.join(arms) or 'none'}, got {arm_id!r}")
    if candidate == baseline:
        raise InvalidArgument(f"two different arms must be given, got {candidate!r} twice")
    estimates = {one.score: one for result in evaluation.arm_results for one in result.scores}
    if score and score not in estimates:
        raise InvalidArgument(f"the score must be one of {', '.join(estimates) or 'none'}, got {score!r}")
    told = score or (evaluation.verdict.score if evaluation.verdict.score in estimates else "")
    return Contest(
        candidate=candidate,
        baseline=baseline,
        score=told,
        lower_is_better=bool(told) and lower_is_better(estimates[told]),
        or_correctness=not score,
    )


def disagreements(predictions: Iterable[Prediction], contest: Contest) -> Iterator[Disagreement]:
    """Yield the records on which two arms disagree, in their order. One that an arm could not answer is none."""
    for prediction in predictions:
        answers = {answer.arm_id: answer for answer in prediction.answers if not answer.HasField("error")}
        candidate, baseline = (answers.get(arm) for arm in (contest.candidate, contest.baseline))
        if candidate is None or baseline is None:
            continue
        lead = _lead(prediction, candidate, baseline, contest)
        side = _side(lead, candidate.text != baseline.text)
        if side is not None:
            yield Disagreement(
                prediction=prediction,
                candidate=candidate,
                baseline=baseline,
                side=side,
                gap=abs(lead or 0.0),
            )


def _side(lead: float | None, texts_differ: bool) -> Side | None:
    if lead is None:
        return "differs" if texts_differ else None
    return "gained" if lead > 0 else "lost" if lead < 0 else None


def _lead(
    prediction: Prediction, candidate: ArmPrediction, baseline: ArmPrediction, contest: Contest
) -> float | None:
    """Return how far the candidate is ahead; None where nothing tells."""
    preferred = _preferred(prediction, contest)
    if preferred is not None:
        return preferred
    mine, other = (answer.scores.get(contest.score) for answer in (candidate, baseline))
    if mine is not None and other is not None:
        return other - mine if contest.lower_is_better else mine - other
    if contest.score and not contest.or_correctness:
        return None
    is_mine, is_other = is_right(candidate), is_right(baseline)
    return None if is_mine is None or is_other is None else float(is_mine) - float(is_other)


def _preferred(prediction: Prediction, contest: Contest) -> float | None:
    """Return in how many orders more, of those that it saw, the contest's judge of pairs preferred the candidate.

    What an arm has as a score of such a judge is of all its rivals. None where no judge of pairs tells, or one order
    is missing.
    """
    orders: dict[str, float] = {}
    for one in prediction.judgements:
        if contest.score != f"{_JUDGED}{one.judge_id}" or not one.HasField("preference"):
            continue
        if {one.arm_id, one.rival_arm_id} == {contest.candidate, contest.baseline}:
            orders[one.arm_id] = _LEADS.get(one.preference, 0.0) * (
                1 if one.arm_id == contest.candidate else -1
            )
    return sum(orders.values()) / 2 if len(orders) == 2 else None
