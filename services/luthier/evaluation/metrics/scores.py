"""Scores of one answer by metric name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from luthier.evaluation.metrics.exact_match import exact_match
from luthier.evaluation.metrics.field_match import field_match

TEXT_METRICS: Mapping[str, Callable[[str, str], dict[str, float]]] = {
    "EXACT_MATCH": lambda prediction, reference: {"exact_match": exact_match(prediction, reference)},
    "FIELD_MATCH": field_match,
}
"""Metrics of a text against its reference. Perplexity needs the model and is measured apart."""


def score_answer(metrics: Sequence[str], prediction: str, reference: str) -> dict[str, float]:
    """Return every score of one answer.

    Raises:
        ValueError: a metric is unknown, or the reference does not suit it.
    """
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric not in TEXT_METRICS:
            raise ValueError(f"metric must be one of {', '.join(TEXT_METRICS)}, got {metric!r}")
        scores |= TEXT_METRICS[metric](prediction, reference)
    return scores


def is_binary(score: str) -> bool:
    """Tell whether a score is right or wrong, so that proportions and McNemar's test apply."""
    return score not in {"field_match.fields", "perplexity"}
