"""The scores there are: what values each has, which are better, and how an answer gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from luthier.grading.metrics.exact_match import exact_match
from luthier.grading.metrics.field_match import field_match


class ScoreKind(StrEnum):
    """What values a score has by record: 0 or 1, a share from 0 to 1, any number."""

    BINARY = "BINARY"
    FRACTION = "FRACTION"
    REAL = "REAL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a score is. A `name` that ends with a dot stands for all names that begin with it.

    `metric`: which gives it. `compares_text`: texts are compared for it, in `TEXT_FORM`. `whole_answer`: it says that
    the whole answer is right.
    """

    name: str
    metric: str
    kind: ScoreKind
    higher_is_better: bool = True
    compares_text: bool = True
    whole_answer: bool = False


PERPLEXITY = "perplexity"
JUDGED = "judge."
"""What the scores of judges begin with; an evaluation that has judges gives one for each."""
GRADED = "grader."
"""What the scores of graders begin with; `graded_scores` has what values those of a given grader have."""
_SCORES = (
    Score(name="exact_match", metric="EXACT_MATCH", kind=ScoreKind.BINARY, whole_answer=True),
    Score(name="field_match.fields", metric="FIELD_MATCH", kind=ScoreKind.FRACTION),
    Score(name="field_match.record", metric="FIELD_MATCH", kind=ScoreKind.BINARY, whole_answer=True),
    Score(name="field_match.parsed", metric="FIELD_MATCH", kind=ScoreKind.BINARY, compares_text=False),
    Score(name="field_match.field.", metric="FIELD_MATCH", kind=ScoreKind.BINARY),
    Score(
        name=PERPLEXITY,
        metric="PERPLEXITY",
        kind=ScoreKind.REAL,
        higher_is_better=False,
        compares_text=False,
    ),
    Score(name=JUDGED, metric="JUDGE", kind=ScoreKind.FRACTION, compares_text=False),
    Score(name=GRADED, metric="GRADER", kind=ScoreKind.REAL, compares_text=False),
)
_BY_NAME = {score.name: score for score in _SCORES}
_FAMILIES = tuple(score for score in _SCORES if score.name.endswith("."))

TEXT_METRICS: Mapping[str, Callable[[str, str], dict[str, float]]] = {
    "EXACT_MATCH": lambda prediction, reference: {"exact_match": exact_match(prediction, reference)},
    "FIELD_MATCH": field_match,
}
"""Metrics of a text against its reference. Perplexity needs the model and is measured apart."""


def find_score(name: str) -> Score | None:
    """Return what a score is; None when there is no such score."""
    own = _BY_NAME.get(name)
    return own or next((family for family in _FAMILIES if name.startswith(family.name)), None)


def score_named(name: str) -> Score:
    """Return what a score is.

    Raises:
        ValueError: there is no such score. A new one says here what it is before it can be used.
    """
    score = find_score(name)
    if score is None:
        raise ValueError(f"score must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return score


def main_score(metric: str) -> str:
    """Return the score that a metric is first of all about: one that judges the whole answer, else its first."""
    own = [score for score in _SCORES if score.metric == metric]
    return min(own, key=lambda score: not score.whole_answer).name


def scores_given(metrics: Sequence[str]) -> list[str]:
    """Return what scores these metrics give; one that ends with a dot stands for all names that begin with it."""
    return [score.name for score in _SCORES if score.metric in metrics]


def is_right(scores: Mapping[str, float]) -> bool | None:
    """Whether the whole answer that has these scores is right, by the first that says so; None when none does."""
    values = (scores[score.name] for score in _SCORES if score.whole_answer and score.name in scores)
    value = next(values, None)
    return None if value is None else value >= 1.0


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
