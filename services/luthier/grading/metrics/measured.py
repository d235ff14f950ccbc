"""Metrics that give each record its scores, by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from luthier.grading.metrics.answer_length import answer_length
from luthier.grading.metrics.bleu import bleu
from luthier.grading.metrics.chrf import chrf
from luthier.grading.metrics.exact_match import exact_match
from luthier.grading.metrics.field_match import field_match
from luthier.grading.metrics.multiple_choice import multiple_choice
from luthier.grading.metrics.preference import preference
from luthier.grading.metrics.prompt_tokens import prompt_tokens
from luthier.grading.metrics.reward import reward
from luthier.grading.metrics.rouge import rouge
from luthier.grading.metrics.said import Said
from luthier.grading.metrics.stop_rate import stop_rate

TEXT_METRICS: Mapping[str, Callable[[Said], dict[str, float]]] = {
    "EXACT_MATCH": lambda said: {"exact_match": exact_match(said.text, said.reference)},
    "FIELD_MATCH": lambda said: field_match(said.text, said.reference),
    "CHRF": chrf,
    "BLEU": bleu,
    "ROUGE": rouge,
}
"""Metrics of a text against its reference."""
METRICS: Mapping[str, Callable[[Said], dict[str, float]]] = {
    **TEXT_METRICS,
    "MULTIPLE_CHOICE": multiple_choice,
    "PREFERENCE": preference,
    "REWARD_MODEL": reward,
    "ANSWER_LENGTH": answer_length,
    "STOP_RATE": stop_rate,
    "PROMPT_TOKENS": prompt_tokens,
}
"""Metrics that give each record its scores. Those of a reference's likelihood are ratios of sums, measured apart."""


def score_answer(metrics: Sequence[str], said: Said) -> dict[str, float]:
    """Return every score of one answer.

    Raises:
        ValueError: a metric is unknown, or the record does not suit it.
    """
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        scores |= METRICS[metric](said)
    return scores
