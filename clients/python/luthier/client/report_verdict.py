"""What a report says first: the verdict in one sentence; and the comparisons behind it."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.client.drift import divergence_words, retained_words, skill_words, text_loss_words
from luthier.client.escaping import escaped_html
from luthier.client.graders import first_error, lost_words
from luthier.client.judges import agreement_words, bias_words, cost_words, error_words, pair_words
from luthier.client.partial_answers import partial_words
from luthier.client.report_parts import estimate_cell, section, table
from luthier.client.scores import (
    difference_words,
    has_bounds,
    is_share,
    lower_is_better,
    main_score,
    pairs_words,
    verdict_word,
)
from luthier.client.verdicts import confidence_words, outcome_class, p_value_words
from luthier.v1.evaluation_pb2 import Comparison, Evaluation, Prediction
from luthier.v1.verdict_pb2 import GuardResult

_STANDINGS = {GuardResult.STANDING_HELD: "better", GuardResult.STANDING_BROKEN: "worse"}


def partial_headline(evaluation: Evaluation, predictions: Sequence[Prediction]) -> str:
    """Return that an evaluation ended before it was scored, why, and what there is of it; nothing of every other."""
    words = partial_words(evaluation, predictions)
    return (
        f'<section class="headline worse"><strong>{escaped_html(words)}</strong></section>\n' if words else ""
    )


def headline(evaluation: Evaluation) -> str:
    """Return the verdict; of an evaluation without one, the last arm against the best of the others."""
    if evaluation.HasField("verdict"):
        return _verdict(evaluation)
    return _older_headline(evaluation)


def _verdict(evaluation: Evaluation) -> str:
    verdict = evaluation.verdict
    guards = "".join(
        f"<small>{_badge(_standing_word(result), _STANDINGS.get(result.standing, ''))}"
        f" {escaped_html(result.sentence)}</small>"
        for result in verdict.guards
    )
    return (
        f'<section class="headline {outcome_class(verdict)}"><strong>{escaped_html(verdict.sentence)}</strong>'
        f"{guards}</section>\n"
    )


def _standing_word(result: GuardResult) -> str:
    return "guard " + GuardResult.Standing.Name(result.standing).removeprefix("STANDING_").lower()


def _older_headline(evaluation: Evaluation) -> str:
    comparison = headline_comparison(evaluation)
    if comparison is None:
        return ""
    word = verdict_word(comparison.verdict)
    unit = " percentage points" if is_share(comparison) else ""
    scale = 100 if is_share(comparison) else 1
    numbers = f"{scale * comparison.difference:+.1f}{unit}"
    if has_bounds(comparison):
        numbers += f" [{scale * comparison.lower:+.1f}, {scale * comparison.upper:+.1f}]"
    return (
        f'<section class="headline {_verdict_class(word)}">'
        f"<b>{escaped_html(comparison.candidate_arm_id)}</b> against <b>{escaped_html(comparison.baseline_arm_id)}</b>:"
        f" <strong>{escaped_html(numbers)}</strong> {_badge(word)}"
        f"<small>{escaped_html(comparison.score)}, {comparison.count} pairs, paired 95 % interval</small>"
        "</section>\n"
    )


def headline_comparison(evaluation: Evaluation) -> Comparison | None:
    """Return the last arm's comparison with its strongest rival on the strictest score; None without one."""
    if not evaluation.comparisons:
        return None
    last = evaluation.arms[-1].arm_id if evaluation.arms else evaluation.comparisons[-1].candidate_arm_id
    its = [comparison for comparison in evaluation.comparisons if comparison.candidate_arm_id == last]
    score = main_score(its)
    rivals = [comparison for comparison in its if comparison.score == score]
    if not rivals:
        return None
    weakest = max if lower_is_better(rivals[0]) else min
    return weakest(rivals, key=lambda comparison: comparison.difference)


def comparison_section(evaluation: Evaluation) -> str:
    """Return every comparison, those first that the verdict rests on."""
    rows = []
    for entry in sorted(evaluation.comparisons, key=lambda one: not one.primary):
        rows.append(
            [
                f"<code>{escaped_html(entry.score)}</code>",
                f"{escaped_html(entry.candidate_arm_id)} − {escaped_html(entry.baseline_arm_id)}",
                _badge(verdict_word(entry.verdict)),
                estimate_cell(difference_words(entry)),
                confidence_words(entry),
                p_value_words(entry),
                pairs_words(entry),
            ]
        )
    head = ["Score", "Compared", "Verdict", "Difference", "Confidence", "p", "Pairs"]
    return section(
        "Paired comparisons", table("Paired comparisons", head, rows, numbers_from=3) if rows else ""
    )


def drift_section(evaluation: Evaluation) -> str:
    """Return what each tuned arm retains of general abilities, whole and by skill, and how far it has moved."""
    skills = list(dict.fromkeys(skill for one in evaluation.drift_results for skill, _ in skill_words(one)))
    rows = []
    for one in evaluation.drift_results:
        words = dict(skill_words(one))
        rows.append(
            [
                f"{escaped_html(one.arm_id)} from {escaped_html(one.baseline_arm_id)}",
                escaped_html(retained_words(one)),
                *(escaped_html(words.get(skill, "")) for skill in skills),
                escaped_html(divergence_words(one)),
                escaped_html(text_loss_words(one)),
            ]
        )
    head = ["Arm", "Retained", *(skill.capitalize() for skill in skills), "Divergence", "General text"]
    told = (
        "<p>Of the general suite's questions that the arm it is held against has right, those that the tuned arm has "
        "right too. Divergence: how much less likely it finds what that arm says itself.</p>"
    )
    return section("What was forgotten", told + table("By arm", head, rows, numbers_from=1) if rows else "")


def grader_section(evaluation: Evaluation) -> str:
    """Return to how many answers each grader gave no score, and the first reason."""
    rows = [
        [escaped_html(one.name), escaped_html(lost_words(one)), escaped_html(first_error(one))]
        for one in evaluation.grader_results
    ]
    told = "<p>An answer without a score of a grader counts in no score of it.</p>"
    return section(
        "Graders", told + table("By grader", ["Grader", "Without a score", "First"], rows) if rows else ""
    )


def judge_section(evaluation: Evaluation) -> str:
    """Return how often each judge gave nothing, what the order of answers does to it, and how the arms did."""
    rows = [
        [
            escaped_html(one.judge_id),
            escaped_html(error_words(one)),
            escaped_html(agreement_words(one)),
            escaped_html(bias_words(one)),
            "<br>".join(escaped_html(pair_words(pair)) for pair in one.pairs),
            escaped_html(cost_words(one)),
        ]
        for one in evaluation.judge_results
    ]
    head = ["Judge", "Without a judgement", "Orders agree", "First preferred by", "Pairs", "Cost"]
    told = (
        "<p>Each pair of answers is shown in both orders. What has no judgement counts in no score. Orders agree: in "
        "what share of the pairs both say the same. First preferred by: how much more often the first answer is.</p>"
    )
    return section("Judges", told + table("By judge", head, rows) if rows else "")


def _badge(word: str, kind: str | None = None) -> str:
    style = _verdict_class(word) if kind is None else kind
    return f'<span class="badge {style}">{escaped_html(word)}</span>'


def _verdict_class(word: str) -> str:
    return word if word in ("better", "worse") else ""
