"""The scores there are: what values each has, and which are better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


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
BITS_PER_BYTE = "bits_per_byte"
JUDGED = "judge."
"""What the scores of judges begin with; an evaluation that has judges gives one for each."""
GRADED = "grader."
"""What the scores of graders begin with; `graded_scores` has what values those of a given grader have."""


def _share(name: str, metric: str) -> Score:
    return Score(name=name, metric=metric, kind=ScoreKind.FRACTION)


def _other(name: str, metric: str, kind: ScoreKind, *, higher_is_better: bool = True) -> Score:
    """Return a score for which no texts are compared."""
    return Score(name=name, metric=metric, kind=kind, higher_is_better=higher_is_better, compares_text=False)


_SCORES = (
    Score(name="exact_match", metric="EXACT_MATCH", kind=ScoreKind.BINARY, whole_answer=True),
    Score(name="field_match.fields", metric="FIELD_MATCH", kind=ScoreKind.FRACTION),
    Score(name="field_match.record", metric="FIELD_MATCH", kind=ScoreKind.BINARY, whole_answer=True),
    Score(name="field_match.parsed", metric="FIELD_MATCH", kind=ScoreKind.BINARY, compares_text=False),
    Score(name="field_match.field.", metric="FIELD_MATCH", kind=ScoreKind.BINARY),
    _other(PERPLEXITY, "PERPLEXITY", ScoreKind.REAL, higher_is_better=False),
    _other(BITS_PER_BYTE, "BITS_PER_BYTE", ScoreKind.REAL, higher_is_better=False),
    _other("multiple_choice.accuracy", "MULTIPLE_CHOICE", ScoreKind.BINARY),
    _other("multiple_choice.accuracy_norm", "MULTIPLE_CHOICE", ScoreKind.BINARY),
    _other("preference.accuracy", "PREFERENCE", ScoreKind.BINARY),
    _other("preference.margin", "PREFERENCE", ScoreKind.REAL),
    _other("reward", "REWARD_MODEL", ScoreKind.REAL),
    _other("answer_length", "ANSWER_LENGTH", ScoreKind.REAL, higher_is_better=False),
    _other("stop_rate", "STOP_RATE", ScoreKind.BINARY),
    _other("prompt_tokens", "PROMPT_TOKENS", ScoreKind.REAL, higher_is_better=False),
    _share("chrf", "CHRF"),
    _share("bleu", "BLEU"),
    _share("rouge.one", "ROUGE"),
    _share("rouge.two", "ROUGE"),
    _share("rouge.longest", "ROUGE"),
    _other(JUDGED, "JUDGE", ScoreKind.FRACTION),
    _other(GRADED, "GRADER", ScoreKind.REAL),
)
_BY_NAME = {score.name: score for score in _SCORES}
_FAMILIES = tuple(score for score in _SCORES if score.name.endswith("."))

RATIOS = frozenset({"PERPLEXITY", "BITS_PER_BYTE"})
"""Metrics of all records together, of a reference's likelihood. All others give each record its scores."""


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
