"""From answers to scores, intervals and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.evaluation.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_perplexity,
    bootstrap_perplexity_difference,
    mcnemar,
    verdict,
    wilson,
)
from luthier.evaluation.metrics.scores import is_binary
from luthier.v1 import evaluation_pb2

PERPLEXITY = "perplexity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one arm said to one record. `nll` (nats) and `num_tokens` are of the reference, 0 when not measured."""

    text: str
    finish_reason: str
    scores: Mapping[str, float]
    nll: float = 0.0
    num_tokens: int = 0


def estimates(answers: Sequence[Answer], seed: int) -> list[evaluation_pb2.ScoreEstimate]:
    """Return every score of an arm: its mean over the records that have it, with a 95 % interval."""
    found = []
    for name in _names(answers):
        values = [answer.scores[name] for answer in answers if name in answer.scores]
        found.append(_estimate(name, values, seed))
    if any(answer.num_tokens for answer in answers):
        nll, tokens = _references(answers)
        found.append(_message(PERPLEXITY, bootstrap_perplexity(nll, tokens, seed=seed)))
    return found


def compare(
    candidate_id: str,
    candidate: Sequence[Answer],
    baseline_id: str,
    baseline: Sequence[Answer],
    seed: int,
) -> list[evaluation_pb2.Comparison]:
    """Compare two arms on each score that both have, record by record."""
    compared = []
    for name in _names(candidate):
        pairs = [
            (left.scores[name], right.scores[name])
            for left, right in zip(candidate, baseline, strict=True)
            if name in left.scores and name in right.scores
        ]
        if not pairs:
            continue
        left, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        difference = bootstrap_difference(left, right, seed=seed)
        message = _comparison(candidate_id, baseline_id, name, difference, higher_is_better=True)
        if is_binary(name):
            message.p_value = mcnemar(left, right)
        compared.append(message)
    measured = [
        (left, right)
        for left, right in zip(candidate, baseline, strict=True)
        if left.num_tokens and right.num_tokens
    ]
    if measured:
        nll, tokens = _references([left for left, _ in measured])
        other, _ = _references([right for _, right in measured])
        difference = bootstrap_perplexity_difference(nll, other, tokens, seed=seed)
        compared.append(
            _comparison(candidate_id, baseline_id, PERPLEXITY, difference, higher_is_better=False)
        )
    return compared


def _names(answers: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(name for answer in answers for name in answer.scores))


def _references(answers: Sequence[Answer]) -> tuple[list[float], list[int]]:
    measured = [answer for answer in answers if answer.num_tokens]
    return [answer.nll for answer in measured], [answer.num_tokens for answer in measured]


def _estimate(name: str, values: Sequence[float], seed: int) -> evaluation_pb2.ScoreEstimate:
    if is_binary(name):
        return _message(name, wilson(round(sum(values)), len(values)))
    return _message(name, bootstrap_mean(values, seed=seed))


def _message(name: str, interval: Interval) -> evaluation_pb2.ScoreEstimate:
    return evaluation_pb2.ScoreEstimate(
        score=name,
        value=interval.value,
        lower=interval.lower,
        upper=interval.upper,
        count=interval.count,
    )


def _comparison(
    candidate_id: str, baseline_id: str, name: str, difference: Interval, *, higher_is_better: bool
) -> evaluation_pb2.Comparison:
    shown = verdict(difference, higher_is_better=higher_is_better)
    return evaluation_pb2.Comparison(
        candidate_arm_id=candidate_id,
        baseline_arm_id=baseline_id,
        score=name,
        difference=difference.value,
        lower=difference.lower,
        upper=difference.upper,
        count=difference.count,
        verdict=evaluation_pb2.Verdict.Value(f"VERDICT_{shown}"),
    )
