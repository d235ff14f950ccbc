"""Scores in words, as the service says what each is: shares in percent, which are better when lower."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def rows_apart(evaluation: Evaluation) -> Iterator[tuple[str, list[ScoreEstimate | None]]]:
    """Yield the main score over records that tuned arms learnt from, and over all others, with a value for each arm.

    Nothing where no such record is there.
    """
    found = evaluation.contamination
    for words, apart in (("not learnt from", found.clean), ("learnt from", found.contaminated)):
        by_arm = {one.arm_id: {entry.score: entry for entry in one.scores} for one in apart}
        known = list(dict.fromkeys(name for scores in by_arm.values() for name in scores))
        measured = (entry for scores in by_arm.values() for entry in scores.values())
        name = evaluation.verdict.score if evaluation.verdict.score in known else main_score(measured)
        if name is not None:
            entries = [by_arm.get(result.arm_id, {}).get(name) for result in evaluation.arm_results]
            yield f"{name}, records {words}", entries


def text_form_words(evaluation: Evaluation) -> str:
    """Return how texts were compared, e.g. `NFC`; empty when none were, or when the result does not say."""
    forms = {
        entry.text_form for result in evaluation.arm_results for entry in result.scores if entry.text_form
    }
    return ", ".join(sorted(TextForm.Name(form).removeprefix("TEXT_FORM_") for form in forms))


def has_bounds(result: ScoreEstimate | Comparison) -> bool:
    """Whether an estimate or a difference has an interval: both bounds are alike where nobody knows it."""
    return result.lower < result.upper


def estimate_words(estimate: ScoreEstimate) -> str:
    """Return `value [lower, upper]`; shares in percent; the value alone where bounds are not known."""
    if not has_bounds(estimate):
        return f"{100 * estimate.value:.1f} %" if is_share(estimate) else f"{estimate.value:.4g}"
    if not is_share(estimate):
        return f"{estimate.value:.4g} [{estimate.lower:.4g}, {estimate.upper:.4g}]"
    return f"{100 * estimate.value:.1f} % [{100 * estimate.lower:.1f}, {100 * estimate.upper:.1f}]"


def difference_words(comparison: Comparison) -> str:
    """Return `difference [lower, upper]`; of shares in percentage points; the difference alone as `estimate_words`."""
    if not is_share(comparison):
        bounds = f" [{comparison.lower:.4g}, {comparison.upper:.4g}]" if has_bounds(comparison) else ""
        return f"{comparison.difference:+.4g}{bounds}"
    bounds = (
        f" [{100 * comparison.lower:+.1f}, {100 * comparison.upper:+.1f}]" if has_bounds(comparison) else ""
    )
    return f"{100 * comparison.difference:+.1f} pp{bounds}"


def pairs_words(comparison: Comparison) -> str:
    """Return how many records a comparison is of, e.g. `45`, or `45 of 48` where some lack a score of one arm."""
    lost = comparison.num_lost_candidate + comparison.num_lost_baseline + comparison.num_lost_both
    return f"{comparison.count:,} of {comparison.count + lost:,}" if lost else f"{comparison.count:,}"


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
