"""Scores in words, as the service says what each is: shares in percent, which are better when lower."""

from __future__ import annotations

from collections.abc import Iterable

from luthier.v1.evaluation_pb2 import (
    CORRECTNESS_RIGHT,
    CORRECTNESS_UNSPECIFIED,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    SCORE_KIND_FRACTION,
    ArmPrediction,
    Comparison,
    Evaluation,
    ScoreEstimate,
    TextForm,
    Verdict,
)


def is_share(result: ScoreEstimate | Comparison) -> bool:
    """Whether a score lies in [0, 1] and is shown in percent."""
    return result.kind in (SCORE_KIND_BINARY, SCORE_KIND_FRACTION)


def lower_is_better(result: ScoreEstimate | Comparison) -> bool:
    """Whether a score is the better the lower it is."""
    return result.direction == SCORE_DIRECTION_LOWER_IS_BETTER


def scores_of(evaluation: Evaluation) -> list[str]:
    """Return the scores of an evaluation, each once, in the order that the service gives them."""
    return list(dict.fromkeys(entry.score for result in evaluation.arm_results for entry in result.scores))


def text_form_words(evaluation: Evaluation) -> str:
    """Return how texts were compared, e.g. `NFC`; empty when none were, or when the result does not say."""
    forms = {
        entry.text_form for result in evaluation.arm_results for entry in result.scores if entry.text_form
    }
    return ", ".join(sorted(TextForm.Name(form).removeprefix("TEXT_FORM_") for form in forms))


def estimate_words(estimate: ScoreEstimate) -> str:
    """Return `value [lower, upper]`; shares in percent."""
    if not is_share(estimate):
        return f"{estimate.value:.4g} [{estimate.lower:.4g}, {estimate.upper:.4g}]"
    return f"{100 * estimate.value:.1f} % [{100 * estimate.lower:.1f}, {100 * estimate.upper:.1f}]"


def difference_words(comparison: Comparison) -> str:
    """Return `difference [lower, upper]`; of shares in percentage points."""
    if not is_share(comparison):
        return f"{comparison.difference:+.4g} [{comparison.lower:.4g}, {comparison.upper:.4g}]"
    return f"{100 * comparison.difference:+.1f} pp [{100 * comparison.lower:+.1f}, {100 * comparison.upper:+.1f}]"


def verdict_word(verdict: Verdict.ValueType) -> str:
    """Return a verdict as people say it, e.g. `insufficient evidence`."""
    return Verdict.Name(verdict).removeprefix("VERDICT_").replace("_", " ").lower()


def is_right(answer: ArmPrediction) -> bool | None:
    """Whether the whole answer is right; None when no score says so."""
    if answer.correctness == CORRECTNESS_UNSPECIFIED:
        return None
    return answer.correctness == CORRECTNESS_RIGHT


def main_score(results: Iterable[ScoreEstimate | Comparison]) -> str | None:
    """Return the first score that says that the whole answer is right, else the first; None when there is none."""
    found = sorted(results, key=lambda result: not result.whole_answer)
    return found[0].score if found else None
