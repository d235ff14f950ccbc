"""The answers of a report, side by side; those on which the two arms that matter disagree come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.client.disagreements import Side, contest_of, disagreements
from luthier.client.escaping import escaped_html
from luthier.client.graders import grade_lines
from luthier.client.judges import judgement_words
from luthier.client.report_filter import FILTER_SCRIPT, answer_filter
from luthier.client.report_parts import section
from luthier.client.scores import is_right
from luthier.client.verdicts import judged_arms
from luthier.v1.evaluation_pb2 import ArmPrediction, Evaluation, Prediction

_MAX_CARDS = 200


def answer_section(evaluation: Evaluation, predictions: Sequence[Prediction]) -> str:
    """Return the first answers, and how many of each arm are right."""
    first, sides, disagreed = _ordered(evaluation, predictions)
    shown = first[:_MAX_CARDS]
    cards = "".join(_card(prediction, sides.get(prediction.row, "")) for prediction in shown)
    counts = []
    for arm in evaluation.arms:
        said = [a for p in predictions for a in p.answers if a.arm_id == arm.arm_id]
        marks = [is_right(answer) for answer in said if not answer.HasField("error")]
        if any(mark is not None for mark in marks):
            counts.append(
                f"{escaped_html(arm.arm_id)} {sum(mark is True for mark in marks)}/{len(marks)} right"
            )
    if disagreed:
        counts.append(disagreed)
    if len(predictions) > _MAX_CARDS:
        counts.append(f"the first {_MAX_CARDS} of {len(predictions):,} are shown")
    summary = f"<p>{' · '.join(counts)}</p>" if counts else ""
    controls = answer_filter(sorted({sides[one.row] for one in shown if one.row in sides}))
    return section("Answers side by side", summary + controls + cards + FILTER_SCRIPT if cards else "")


def _ordered(
    evaluation: Evaluation, predictions: Sequence[Prediction]
) -> tuple[Sequence[Prediction], Mapping[int, Side], str]:
    """Return the predictions, those first on which the judged arm and its rival are furthest apart.

    Behind them by row who is better there, and in words how many there are; nothing where they disagree on nothing.
    """
    candidate, baseline = judged_arms(evaluation)
    if not candidate:
        return predictions, {}, ""
    contest = contest_of(evaluation, candidate, baseline)
    found = list(disagreements(predictions, contest))
    gaps = {one.prediction.row: one.gap for one in found}
    first = sorted(predictions, key=lambda one: (one.row not in gaps, -gaps.get(one.row, 0.0)))
    told = f"{len(gaps):,} on which {candidate} and {baseline} disagree ({contest.told_by}) come first"
    return first, {one.prediction.row: one.side for one in found}, escaped_html(told) if gaps else ""


def _card(prediction: Prediction, side: str) -> str:
    turns = "\n".join(
        f"<b>{escaped_html(turn.role)}</b> {escaped_html(turn.content)}" for turn in prediction.prompt
    )
    reference = f'<div class="answer"><h3>reference</h3><pre>{escaped_html(prediction.reference)}</pre></div>'
    place = f"{prediction.filename}:{prediction.line}"
    answers = "".join(_answer(answer, place) for answer in prediction.answers)
    judged = "".join(
        f"<li>{escaped_html(f'judge {one.judge_id}: {judgement_words(one)}')}</li>"
        for one in prediction.judgements
    )
    return (
        f'<div class="prediction" data-side="{side}"><p class="question">{turns}</p>'
        f'<div class="answers">{reference}{answers}</div>{f"<ul>{judged}</ul>" if judged else ""}</div>'
    )


def _answer(answer: ArmPrediction, place: str) -> str:
    right, text = is_right(answer), answer.text
    kind, mark = ("", "") if right is None else ("right", "✓ right") if right else ("wrong", "✗ wrong")
    if answer.HasField("error"):
        kind, mark, text = "wrong", "no answer", f"{place}: {answer.error.message}"
    grades = "".join(
        f"<li>{escaped_html(f'grader {name}: {words}')}</li>" for name, words in grade_lines(answer)
    )
    return (
        f'<div class="answer {kind}"><h3>{escaped_html(answer.arm_id)}<span>{mark}</span></h3>'
        f"<pre>{escaped_html(text)}</pre>{f'<ul>{grades}</ul>' if grades else ''}</div>"
    )
