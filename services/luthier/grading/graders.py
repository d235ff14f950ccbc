"""Graders at work: a message, read once, gives each sample a score or an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from luthier.errors import Reason
from luthier.grading import expressions, patterns, templates
from luthier.grading.asked import below
from luthier.grading.metrics.field_match import field_match
from luthier.grading.metrics.text_form import in_text_form
from luthier.grading.number_texts import is_close, last_number, number_of
from luthier.grading.outcomes import Grade, GradingError, Sample, shown
from luthier.grading.similarity import similarity
from luthier.v1.grader_pb2 import (
    Grader,
    JsonMatchGrader,
    MultiGrader,
    NumberMatchGrader,
    RegexGrader,
    RemoteGrader,
    RewardModelGrader,
    ScoreRange,
    StringCheckGrader,
    TextSimilarityGrader,
)

_ROUNDING = 1e-9
"""Share of a range by which a score may lie beyond it: 0.1 + 0.2 + 0.7 is not quite 1."""
_Parts = dict[str, float]
_Score = Callable[[Sample, _Parts], float]


class ReadGrader:
    """A grader that was read from its message; what it is given changes nothing in it.

    The message must have passed `checks.grader_violations`.
    """

    def __init__(self, grader: Grader) -> None:
        self._score = _node(grader, "")

    def grade(self, sample: Sample) -> Grade:
        """Return what it makes of a sample; the score is finite and in the grader's range."""
        parts: _Parts = {}
        try:
            return Grade(score=self._score(sample, parts), parts=parts)
        except GradingError as error:
            return Grade(score=None, error=error, parts=parts)


def _node(grader: Grader, path: str) -> _Score:
    kind = grader.WhichOneof("kind")
    assert kind is not None, "a grader that passed the checks has a kind"
    if kind == "multi":
        score = _multi(grader.multi, path)
    elif kind == "remote":
        score = _remote(grader.remote, path)
    elif kind == "reward_model":
        score = _reward_model(grader.reward_model, path)
    else:
        score = _LEAVES[kind](getattr(grader, kind))
    label = f"grader {path or grader.name or kind}"

    def labelled(sample: Sample, parts: _Parts) -> float:
        try:
            return score(sample, parts)
        except _PartFailed:
            raise
        except GradingError as error:
            raise _PartFailed(error.reason, f"{label}: {error.message}") from error

    return labelled


class _PartFailed(GradingError):
    """An error that says already of which grader it is."""


def _multi(grader: MultiGrader, path: str) -> _Score:
    inner = {name: _node(one, below(path, name)) for name, one in sorted(grader.graders.items())}
    expression = expressions.parsed(grader.calculate_output)
    limits = _limits(grader)

    def score(sample: Sample, parts: _Parts) -> float:
        scores: dict[str, float] = {}
        for name, one in inner.items():
            scores[name] = parts[below(path, name)] = one(sample, parts)
        return _in_range(expression.value(scores), limits)

    return score


def _remote(grader: RemoteGrader, path: str) -> _Score:
    limits = _limits(grader)

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        outcome = sample.remote[path]
        if isinstance(outcome, GradingError):
            raise outcome
        return _in_range(outcome, limits)

    return score


def _reward_model(grader: RewardModelGrader, path: str) -> _Score:
    name = grader.model

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        value = sample.values[path]
        if isinstance(value, GradingError):
            raise value
        if not math.isfinite(value):
            raise GradingError(
                Reason.SCORE_NOT_FINITE, f"the value that {name} gives must be finite, got {value}"
            )
        return value

    return score


def _string_check(grader: StringCheckGrader) -> _Score:
    text_of, reference_of = _two_texts(grader)
    operation = StringCheckGrader.Operation.Name(grader.operation).removeprefix("OPERATION_")

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        text, reference = text_of.filled(sample), reference_of.filled(sample)
        if operation in ("EQ", "NE"):
            return float((text == reference) == (operation == "EQ"))
        if not reference:
            raise _invalid("reference must not be empty: every text holds the empty one")
        if operation == "ILIKE":
            text, reference = text.casefold(), reference.casefold()
        return float(reference in text)

    return score


def _text_similarity(grader: TextSimilarityGrader) -> _Score:
    text_of, reference_of = _two_texts(grader)
    measure = TextSimilarityGrader.Similarity.Name(grader.evaluation_metric).removeprefix("SIMILARITY_")

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        return similarity(measure, text_of.filled(sample), reference_of.filled(sample))

    return score


def _json_match(grader: JsonMatchGrader) -> _Score:
    text_of, reference_of = _two_texts(grader)
    fields = tuple(in_text_form(name) for name in grader.fields)
    whole = grader.whole

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        try:
            scores = field_match(text_of.filled(sample), reference_of.filled(sample))
        except ValueError as error:
            raise _invalid(str(error)) from error
        if not fields:
            return scores["field_match.record" if whole else "field_match.fields"]
        found = [_field_score(scores, name) for name in fields]
        return float(all(found)) if whole else sum(found) / len(found)

    return score


def _field_score(scores: Mapping[str, float], name: str) -> float:
    score = scores.get(f"field_match.field.{name}")
    if score is None:
        raise _invalid(f"the reference has no field {shown(name)}")
    return score


def _number_match(grader: NumberMatchGrader) -> _Score:
    text_of, reference_of = _two_texts(grader)
    pattern = patterns.parsed(grader.pattern) if grader.pattern else None
    absolute, relative = grader.absolute_tolerance, grader.relative_tolerance

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        reference = reference_of.filled(sample)
        right = number_of(reference)
        if right is None:
            raise _invalid(f"reference must be a number and nothing else, got {shown(reference)}")
        text = text_of.filled(sample)
        found = last_number(text) if pattern is None else number_of(pattern.last_group(text) or "")
        return float(found is not None and is_close(found, right, absolute, relative))

    return score


def _regex(grader: RegexGrader) -> _Score:
    text_of = templates.parsed(grader.input, "input")
    pattern = patterns.parsed(grader.pattern)
    whole = grader.full_match

    def score(sample: Sample, parts: _Parts) -> float:
        del parts
        return float(pattern.matches(text_of.filled(sample), whole=whole))

    return score


_LEAVES: Mapping[str, Callable[..., _Score]] = {
    "string_check": _string_check,
    "text_similarity": _text_similarity,
    "json_match": _json_match,
    "number_match": _number_match,
    "regex": _regex,
}


def _two_texts(
    grader: StringCheckGrader | TextSimilarityGrader | JsonMatchGrader | NumberMatchGrader,
) -> Sequence[templates.Template]:
    return templates.parsed(grader.input, "input"), templates.parsed(grader.reference, "reference")


def _limits(grader: MultiGrader | RemoteGrader) -> ScoreRange:
    return grader.range if grader.HasField("range") else ScoreRange(min=0.0, max=1.0)


def _in_range(value: float, limits: ScoreRange) -> float:
    if not math.isfinite(value):
        raise GradingError(Reason.SCORE_NOT_FINITE, f"a score must be finite, got {value}")
    slack = _ROUNDING * (limits.max - limits.min)
    if not limits.min - slack <= value <= limits.max + slack:
        raise GradingError(
            Reason.SCORE_OUT_OF_RANGE,
            f"a score must be in {limits.min:g}..{limits.max:g}, got {value:g}; say the range that is meant in `range`",
        )
    return min(max(value, limits.min), limits.max)


def _invalid(message: str) -> GradingError:
    return GradingError(Reason.GRADER_INPUT_INVALID, message)
