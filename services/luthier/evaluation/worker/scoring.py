"""From answers to scores with intervals, and to differences of two arms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from luthier.errors import FailedPrecondition, Reason
from luthier.grading.graded_scores import NameScore
from luthier.grading.metrics.intervals import Interval, wilson
from luthier.grading.metrics.means import perplexity, rate_mean, real_mean, share_mean
from luthier.grading.metrics.paired import (
    PairedDifference,
    binary_difference,
    perplexity_difference,
    rate_difference,
    real_difference,
    share_difference,
)
from luthier.grading.metrics.scores import BITS_PER_BYTE, PERPLEXITY, Score, ScoreKind, score_named
from luthier.grading.metrics.text_form import TEXT_FORM
from luthier.v1 import evaluation_pb2

_MEANS = {ScoreKind.FRACTION: share_mean, ScoreKind.REAL: real_mean}
_DIFFERENCES = {
    ScoreKind.BINARY: binary_difference,
    ScoreKind.FRACTION: share_difference,
    ScoreKind.REAL: real_difference,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one arm said to one record.

    Attributes:
        text: the answer.
        finish_reason: why it ended.
        scores: by name.
        points: of scores that hold two arms against each other, from 0 to 1 by score and the other arm's id.
        nll: of the reference, in nats; 0 when it was not measured.
        num_tokens: of the reference, where its perplexity is wanted; 0 when it is not, or was not measured.
        num_bytes: of the reference, where its bits for each byte are wanted; 0 as `num_tokens`.
        failed: the arm could not answer: it has no score.
    """

    text: str
    finish_reason: str
    scores: Mapping[str, float]
    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    failed: bool = False


def estimates(
    answers: Sequence[Answer], named: NameScore = score_named
) -> list[evaluation_pb2.ScoreEstimate]:
    """Return every score of an arm: its mean over the records that have it, with a 95 % interval.

    `named` says what each score is.

    Raises:
        ValueError: a score is unknown or not of its kind.
        FailedPrecondition: LOSS_NOT_FINITE, a reference has no finite likelihood.
    """
    found = []
    for name in names_of(answers):
        values = [answer.scores[name] for answer in answers if name in answer.scores]
        found.append(_estimate(named(name), name, values))
    if any(answer.num_tokens for answer in answers):
        nll, tokens = _references(answers)
        with _named_failure():
            found.append(_message(named(PERPLEXITY), PERPLEXITY, perplexity(nll, tokens)))
    if any(answer.num_bytes for answer in answers):
        bits, sizes = _bits(answers)
        found.append(_message(named(BITS_PER_BYTE), BITS_PER_BYTE, rate_mean(bits, sizes)))
    return found


def differences(
    candidate: Sequence[Answer], baseline: Sequence[Answer], named: NameScore = score_named
) -> Iterator[tuple[str, PairedDifference]]:
    """Yield each score that both arms have with its difference, record by record. Raises as `estimates`.

    Scores of which each record holds two arms against each other are left to `preferences`.
    """
    by_pairs = _names_of_pairs(candidate)
    for name in (name for name in names_of(candidate) if name not in by_pairs):
        pairs = [
            (left.scores[name], right.scores[name])
            for left, right in zip(candidate, baseline, strict=True)
            if name in left.scores and name in right.scores
        ]
        if pairs:
            left, right = zip(*pairs, strict=True)
            yield name, _DIFFERENCES[named(name).kind](left, right)
    measured = [
        (left, right)
        for left, right in zip(candidate, baseline, strict=True)
        if left.num_tokens and right.num_tokens
    ]
    if measured:
        mine, other = (_references(side) for side in zip(*measured, strict=True))
        with _named_failure():
            yield PERPLEXITY, perplexity_difference(mine, other)
    sized = [
        (left, right)
        for left, right in zip(candidate, baseline, strict=True)
        if left.num_bytes and right.num_bytes
    ]
    if sized:
        (mine_bits, sizes), (other_bits, _) = (_bits(side) for side in zip(*sized, strict=True))
        yield BITS_PER_BYTE, rate_difference(mine_bits, other_bits, sizes)


def preferences(candidate: Sequence[Answer], baseline_arm_id: str) -> Iterator[tuple[str, PairedDifference]]:
    """Yield each score that holds two arms against each other, as the difference of their shares of the points."""
    for name in _names_of_pairs(candidate):
        found = (answer.points.get(name, {}).get(baseline_arm_id) for answer in candidate)
        mine = [points for points in found if points is not None]
        if mine:
            yield name, share_difference(mine, [1 - points for points in mine])


def _names_of_pairs(answers: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(name for answer in answers for name in answer.points))


def names_of(answers: Sequence[Answer]) -> list[str]:
    """Return the scores of texts that an arm has, each once."""
    return list(dict.fromkeys(name for answer in answers for name in answer.scores))


def _references(answers: Sequence[Answer]) -> tuple[list[float], list[int]]:
    measured = [answer for answer in answers if answer.num_tokens]
    return [answer.nll for answer in measured], [answer.num_tokens for answer in measured]


def _bits(answers: Sequence[Answer]) -> tuple[list[float], list[int]]:
    """Return the bits and the bytes of references."""
    measured = [answer for answer in answers if answer.num_bytes]
    return [answer.nll / math.log(2) for answer in measured], [answer.num_bytes for answer in measured]


@contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        message = f"the perplexity of the references cannot be told: {error}"
        raise FailedPrecondition(message, reason=Reason.LOSS_NOT_FINITE) from error


def _estimate(score: Score, name: str, values: Sequence[float]) -> evaluation_pb2.ScoreEstimate:
    if score.kind is not ScoreKind.BINARY:
        return _message(score, name, _MEANS[score.kind](values))
    wrong = [value for value in values if value not in (0.0, 1.0)]
    if wrong:
        raise ValueError(f"{name} is BINARY: its values must be 0 or 1, got {wrong[:3]}")
    return _message(score, name, wilson(round(sum(values)), len(values)))


def _message(score: Score, name: str, interval: Interval) -> evaluation_pb2.ScoreEstimate:
    form = f"TEXT_FORM_{TEXT_FORM}" if score.compares_text else "TEXT_FORM_UNSPECIFIED"
    return evaluation_pb2.ScoreEstimate(
        score=name,
        value=interval.value,
        lower=interval.lower,
        upper=interval.upper,
        count=interval.count,
        kind=evaluation_pb2.ScoreKind.Value(f"SCORE_KIND_{score.kind}"),
        direction=direction_of(higher_is_better=score.higher_is_better),
        text_form=evaluation_pb2.TextForm.Value(form),
    )


def share_estimate(name: str, interval: Interval) -> evaluation_pb2.ScoreEstimate:
    """Return a share of questions as messages say it, of a score that is no metric's."""
    return _plain(name, interval, evaluation_pb2.SCORE_KIND_BINARY, higher_is_better=True)


def real_estimate(name: str, interval: Interval) -> evaluation_pb2.ScoreEstimate:
    """Return a number that is the better the lower it is as messages say it, of a score that is no metric's."""
    return _plain(name, interval, evaluation_pb2.SCORE_KIND_REAL, higher_is_better=False)


def _plain(
    name: str, interval: Interval, kind: evaluation_pb2.ScoreKind.ValueType, *, higher_is_better: bool
) -> evaluation_pb2.ScoreEstimate:
    return evaluation_pb2.ScoreEstimate(
        score=name,
        value=interval.value,
        lower=interval.lower,
        upper=interval.upper,
        count=interval.count,
        kind=kind,
        direction=direction_of(higher_is_better=higher_is_better),
    )


def direction_of(*, higher_is_better: bool) -> evaluation_pb2.ScoreDirection.ValueType:
    """Return a direction as messages say it."""
    if higher_is_better:
        return evaluation_pb2.SCORE_DIRECTION_HIGHER_IS_BETTER
    return evaluation_pb2.SCORE_DIRECTION_LOWER_IS_BETTER
