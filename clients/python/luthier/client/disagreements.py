"""Where two arms disagree: the records on which their scores, or where no score tells their answers, differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from luthier.client.scores import is_right, lower_is_better
from luthier.errors import InvalidArgument
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Prediction

Side = Literal["gained", "lost", "differs"]
SIDES: tuple[Side, ...] = ("gained", "lost", "differs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A record on which two arms disagree.

    `side`: `gained` where the candidate is better, `lost` where the baseline is, `differs` where no score says which.
    """

    prediction: Prediction
    candidate: ArmPrediction
    baseline: ArmPrediction
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Two arms, and the score that tells them apart; empty: whether the whole answer is right."""

    candidate: str
    baseline: str
    score: str = ""
    lower_is_better: bool = False


def contest_of(evaluation: Evaluation, candidate: str, baseline: str, score: str = "") -> Contest:
    """Return a contest between two arms of an evaluation.

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
    is_lower = bool(score) and lower_is_better(estimates[score])
    return Contest(candidate=candidate, baseline=baseline, score=score, lower_is_better=is_lower)


def disagreements(predictions: Iterable[Prediction], contest: Contest) -> Iterator[Disagreement]:
    """Yield the records on which two arms disagree, in their order. One that an arm could not answer is none."""
    for prediction in predictions:
        answers = {answer.arm_id: answer for answer in prediction.answers if not answer.HasField("error")}
        candidate, baseline = (answers.get(arm) for arm in (contest.candidate, contest.baseline))
        if candidate is None or baseline is None:
            continue
        side = _side(candidate, baseline, contest)
        if side is not None:
            yield Disagreement(prediction=prediction, candidate=candidate, baseline=baseline, side=side)


def _side(candidate: ArmPrediction, baseline: ArmPrediction, contest: Contest) -> Side | None:
    values = [_value(answer, contest.score) for answer in (candidate, baseline)]
    if None in values:
        return "differs" if candidate.text != baseline.text else None
    mine, other = values
    if mine == other:
        return None
    return "gained" if (mine > other) != contest.lower_is_better else "lost"  # type: ignore[operator]


def _value(answer: ArmPrediction, score: str) -> float | None:
    if not score:
        right = is_right(answer)
        return None if right is None else float(right)
    return answer.scores.get(score)
