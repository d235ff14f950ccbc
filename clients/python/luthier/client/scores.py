"""Scores in words: which are shares, which are better when lower, when an answer is right."""

from __future__ import annotations

from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Verdict

_WHOLE_RECORD = ("field_match.record", "exact_match")


def is_share(score: str) -> bool:
    """Whether a score lies in [0, 1] and is shown in percent."""
    return not score.startswith("perplexity")


def scores_of(evaluation: Evaluation) -> list[str]:
    """Return the scores of an evaluation, each once, in the order that the service gives them."""
    return list(dict.fromkeys(entry.score for result in evaluation.arm_results for entry in result.scores))


def amount(score: str, value: float, *, signed: bool = False) -> str:
    """Return one value of a score: percent for shares, else four significant digits."""
    sign = "+" if signed else ""
    if is_share(score):
        return f"{100 * value:{sign}.1f}{'' if signed else ' %'}"
    return f"{value:{sign}.4g}"


def interval(score: str, value: float, lower: float, upper: float, *, signed: bool = False) -> str:
    """Return `value [lower, upper]`; differences of shares (`signed`) in percentage points."""
    if not is_share(score):
        return f"{amount(score, value, signed=signed)} [{lower:.4g}, {upper:.4g}]"
    unit = " pp" if signed else " %"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}{unit} [{100 * lower:{sign}.1f}, {100 * upper:{sign}.1f}]"


def verdict_word(verdict: Verdict.ValueType) -> str:
    """Return a verdict as people say it, e.g. `insufficient evidence`."""
    return Verdict.Name(verdict).removeprefix("VERDICT_").replace("_", " ").lower()


def is_right(answer: ArmPrediction) -> bool | None:
    """Whether the whole answer is right; None when no score says so."""
    for score in _WHOLE_RECORD:
        if score in answer.scores:
            return answer.scores[score] >= 1.0
    return None
