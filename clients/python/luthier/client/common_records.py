"""Answers of two evaluations to the same records of one dataset version, side by side as those of one are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from luthier.client.disagreements import Contest
from luthier.client.names import short
from luthier.client.score_makers import why_apart
from luthier.client.scores import lower_is_better
from luthier.client.verdicts import judged_arms
from luthier.errors import InvalidArgument
from luthier.v1.dataset_pb2 import Split
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Prediction, ScoreEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """One arm of an evaluation."""

    evaluation: Evaluation
    arm_id: str

    @property
    def label(self) -> str:
        """What it is called beside an arm of another evaluation: `support-2:tuned`."""
        return f"{short(self.evaluation.name)}:{self.arm_id}"

    def scores(self) -> dict[str, ScoreEstimate]:
        """Return what was measured of it, in the order that the service gives."""
        found = (one for one in self.evaluation.arm_results if one.arm_id == self.arm_id)
        return {one.score: one for result in found for one in result.scores}


def entrant(evaluation: Evaluation, arm_id: str = "") -> Entrant:
    """Return an arm of an evaluation; without an id the one that its verdict judges, else its last.

    Raises InvalidArgument for an arm that it does not have.
    """
    arms = [arm.arm_id for arm in evaluation.arms]
    chosen = arm_id or judged_arms(evaluation)[0] or next(iter(arms), "")
    if chosen not in arms:
        raise InvalidArgument(
            f"the arm must be one of {', '.join(arms) or 'none'} of {short(evaluation.name)}, got {chosen!r}"
        )
    return Entrant(evaluation=evaluation, arm_id=chosen)


def contest_between(candidate: Entrant, baseline: Entrant, score: str = "") -> Contest:
    """Return a contest between arms of two evaluations, which have asked records of one dataset version.

    Without a score that of the candidate's verdict tells them apart where it is one thing in both; else whether the
    whole answer is right. Raises InvalidArgument for evaluations of different records, and for a score that not both
    have, or that others have given.
    """
    if candidate.evaluation.name == baseline.evaluation.name:
        raise InvalidArgument(
            f"two different evaluations must be given, got {short(candidate.evaluation.name)} twice; two arms of "
            "one are named behind it"
        )
    _require_same_records(candidate.evaluation, baseline.evaluation)
    measured, other = candidate.scores(), baseline.scores()
    apart = {
        name: why_apart(name, candidate.evaluation, baseline.evaluation) for name in measured if name in other
    }
    common = [name for name, why in apart.items() if not why]
    if score and score not in common:
        why = f": {apart[score]}" if score in apart else ""
        known = ", ".join(common) or "of which there is none"
        raise InvalidArgument(f"the score must be one that both have, {known}, got {score!r}{why}")
    verdict_score = candidate.evaluation.verdict.score
    told = score or (verdict_score if verdict_score in common else "")
    return Contest(
        candidate=candidate.label,
        baseline=baseline.label,
        score=told,
        lower_is_better=bool(told) and lower_is_better(measured[told]),
        or_correctness=not score,
        passed_over="" if told else apart.get(verdict_score, ""),
    )


def common_records(
    candidate: Entrant, asked: Iterable[Prediction], baseline: Entrant, before: Iterable[Prediction]
) -> Iterator[Prediction]:
    """Yield the records that both evaluations asked, in the order of the first, with the answers of the two arms.

    Records are the same by their content (`record_id`); one that a version has several times is matched in order.
    Memory: the answers of the second.

    Args:
        candidate: an arm of the evaluation whose predictions `asked` are.
        asked: all of its predictions.
        baseline: an arm of the evaluation whose predictions `before` are.
        before: all of its predictions.
    """
    answers = {place: _answer(one, baseline) for place, one in _placed(before)}
    for place, one in _placed(asked):
        mine, other = _answer(one, candidate), answers.get(place)
        if mine is None or other is None:
            continue
        paired = Prediction()
        paired.CopyFrom(one)
        del paired.answers[:], paired.judgements[:]
        paired.answers.extend([other, mine])
        yield paired


def _require_same_records(one: Evaluation, other: Evaluation) -> None:
    first, second = ((it.dataset_version, it.dataset_digest, it.split) for it in (one, other))
    if first == second:
        return
    raise InvalidArgument(
        "both evaluations must have asked records of the same split of the same dataset version, got "
        f"{_records_words(one)} and {_records_words(other)}"
    )


def _records_words(evaluation: Evaluation) -> str:
    split = Split.Name(evaluation.split).removeprefix("SPLIT_")
    return (
        f"{short(evaluation.name)} on {split} of {short(evaluation.dataset_version)} "
        f"({evaluation.dataset_digest[:12] or 'no digest'})"
    )


def _placed(predictions: Iterable[Prediction]) -> Iterator[tuple[tuple[str, int], Prediction]]:
    seen: Counter[str] = Counter()
    for one in predictions:
        yield (one.record_id, seen[one.record_id]), one
        seen[one.record_id] += 1


def _answer(prediction: Prediction, whose: Entrant) -> ArmPrediction | None:
    for answer in prediction.answers:
        if answer.arm_id == whose.arm_id:
            renamed = ArmPrediction()
            renamed.CopyFrom(answer)
            renamed.arm_id = whose.label
            return renamed
    return None
