"""What a report says first, and in which order it shows answers."""

from __future__ import annotations

import re

from luthier.client.report import ReportData, render_report
from luthier.client.scores import difference_words
from luthier.v1.evaluation_pb2 import (
    COMPARISON_METHOD_SCORE_TEST,
    CORRECTNESS_RIGHT,
    CORRECTNESS_WRONG,
    SCORE_KIND_BINARY,
    SCORE_KIND_REAL,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationArm,
    Prediction,
    ScoreEstimate,
)
from luthier.v1.verdict_pb2 import EvaluationVerdict, GuardResult

SENTENCE = "Inconclusive: 48 records do not tell tuned from few on <exact_match>: +4.2 pp [-8.0, +16.0]."


def evaluation() -> Evaluation:
    return Evaluation(
        name="projects/default/evaluations/e",
        arms=[EvaluationArm(arm_id=arm) for arm in ("zero", "few", "tuned")],
        arm_results=[
            ArmResult(
                arm_id=arm,
                scores=[
                    ScoreEstimate(score="exact_match", value=0.5, lower=0.4, upper=0.6, whole_answer=True),
                    ScoreEstimate(score="field_match.fields", value=0.7, lower=0.6, upper=0.8),
                ],
            )
            for arm in ("zero", "few", "tuned")
        ],
        verdict=EvaluationVerdict(
            outcome=EvaluationVerdict.OUTCOME_INCONCLUSIVE,
            sentence=SENTENCE,
            score="field_match.fields",
            candidate_arm_id="tuned",
            rival_arm_id="few",
            guards=[GuardResult(standing=GuardResult.STANDING_BROKEN, sentence="tuned loses <much>")],
        ),
    )


def comparison(score: str, *, primary: bool, adjusted: float | None = None) -> Comparison:
    return Comparison(
        candidate_arm_id="tuned",
        baseline_arm_id="few",
        score=score,
        difference=0.2,
        lower=0.1,
        upper=0.3,
        p_value=0.01,
        adjusted_p_value=adjusted,
        confidence=0.95 if adjusted is None else 0.99,
        count=48,
        kind=SCORE_KIND_BINARY,
        method=COMPARISON_METHOD_SCORE_TEST,
        primary=primary,
        verdict=VERDICT_BETTER if adjusted is None else VERDICT_INCONCLUSIVE,
    )


def prediction(row: int, *, few: bool, tuned: bool) -> Prediction:
    made = Prediction(row=row)
    made.prompt.add(role="user", content=f"question {row}")
    for arm_id, right in (("few", few), ("tuned", tuned)):
        mark = CORRECTNESS_RIGHT if right else CORRECTNESS_WRONG
        made.answers.add(arm_id=arm_id, text="x", correctness=mark)
    return made


def free_text(row: int, few: float, tuned: float) -> Prediction:
    """No answer is right to the letter, and some are better than others."""
    made = prediction(row, few=False, tuned=False)
    for answer, value in zip(made.answers, (few, tuned), strict=True):
        answer.scores["field_match.fields"] = value
    return made


def test_the_first_thing_is_the_verdict_in_one_sentence() -> None:
    html = render_report(ReportData(evaluation=evaluation()))
    body = html[html.index("</header>") :]
    first = body[body.index("<section") : body.index("</section>")]
    assert first.startswith('<section class="headline "><strong>Inconclusive: 48 records do not tell')
    assert "&lt;exact_match&gt;" in first
    assert '<span class="badge worse">guard broken</span> tuned loses &lt;much&gt;' in first
    assert "against" not in first


def test_the_chart_is_of_the_score_that_the_verdict_is_about() -> None:
    html = render_report(ReportData(evaluation=evaluation()))
    assert "<h3>field_match.fields</h3>" in html


def test_primary_comparisons_come_first_with_the_p_value_and_the_confidence_of_their_verdict() -> None:
    found = evaluation()
    found.comparisons.extend(
        [
            comparison("exact_match", primary=False, adjusted=0.31),
            comparison("field_match.fields", primary=True),
        ]
    )
    html = render_report(ReportData(evaluation=found))
    table = html[html.index("Paired comparisons") :]
    rows = re.findall(r"<tr><td><code>([\w.]+)</code>.*?</tr>", table, re.DOTALL)
    assert rows == ["field_match.fields", "exact_match"]
    row = table[table.index("<code>exact_match</code>") :]
    assert re.search(r"99 %</td><td[^>]*>0\.31</td>", row)
    assert "corrected (Holm)" in html


def test_pairs_that_were_lost_stand_beside_those_that_were_counted() -> None:
    found, lost = evaluation(), comparison("exact_match", primary=True)
    lost.num_lost_candidate, lost.num_lost_baseline, lost.num_lost_both = 1, 2, 4
    found.comparisons.extend([lost, comparison("field_match.fields", primary=False)])
    found.warnings.append("tuned and few have 48 of 55 records in common on <exact_match>")
    html = render_report(ReportData(evaluation=found))
    table = html[html.index("Paired comparisons") :]
    assert re.findall(r"<td[^>]*>(48[^<]*)</td></tr>", table) == ["48 of 55", "48"]
    assert (
        '<p class="warning">tuned and few have 48 of 55 records in common on &lt;exact_match&gt;</p>' in html
    )


def test_an_evaluation_older_than_its_methods_says_what_was_done_then() -> None:
    found = evaluation()
    found.ClearField("verdict")
    older = comparison("exact_match", primary=False)
    older.ClearField("method")
    found.comparisons.append(older)
    html = render_report(ReportData(evaluation=found))
    assert "with 95 % bootstrap intervals" in html
    assert "<b>tuned</b> against <b>few</b>" in html


def test_a_difference_without_an_interval_is_shown_alone() -> None:
    found = evaluation()
    row = comparison("grader.fair", primary=True)
    row.difference = row.lower = row.upper = 1.0
    row.kind = SCORE_KIND_REAL
    assert difference_words(row) == "+1"
    found.comparisons.append(row)
    table = render_report(ReportData(evaluation=found)).partition("Paired comparisons")[2]
    assert re.search(r"<td[^>]*>\+1</td>", table)
    row.kind = SCORE_KIND_BINARY
    assert difference_words(row) == "+100.0 pp"
    found.ClearField("verdict")
    assert "<strong>+1.0</strong>" in render_report(ReportData(evaluation=found))


def test_sections_come_in_the_order_in_which_one_decides() -> None:
    found = evaluation()
    found.drift_results.add(
        arm_id="tuned", baseline_arm_id="zero", retained=ScoreEstimate(value=0.9, count=9)
    )
    found.comparisons.append(comparison("field_match.fields", primary=True))
    found.arm_results[1].num_prompt_tokens = 12_345
    html = render_report(ReportData(evaluation=found, predictions=[prediction(0, few=False, tuned=True)]))
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    assert heads[0] == "Results"
    assert heads.index("What it cost") == heads.index("What was forgotten") + 1
    assert heads.index("What it cost") < heads.index("Answers side by side")
    assert re.search(r"prompt tokens read</td><td[^>]*>0</td><td[^>]*>12,345</td>", html)


def test_answers_have_a_filter_that_only_who_runs_it_sees() -> None:
    predictions = [prediction(0, few=True, tuned=True), prediction(1, few=False, tuned=True)]
    html = render_report(ReportData(evaluation=evaluation(), predictions=predictions))
    assert re.findall(r'class="prediction" data-side="(\w*)"', html) == ["gained", ""]
    assert re.search(r'<div id="answer-filter"[^>]* hidden>', html)
    assert re.findall(r'<option value="(\w*)">', html) == ["", "any", "gained"]
    assert html.count("<script>") == 1
    assert "<script>" not in render_report(ReportData(evaluation=evaluation()))


def test_answers_on_which_the_two_arms_disagree_come_first() -> None:
    predictions = [
        prediction(0, few=True, tuned=True),
        prediction(1, few=False, tuned=True),
        prediction(2, few=False, tuned=False),
        prediction(3, few=True, tuned=False),
    ]
    html = render_report(ReportData(evaluation=evaluation(), predictions=predictions))
    assert re.findall(r"question (\d)", html) == ["1", "3", "0", "2"]
    assert "2 on which tuned and few disagree (field_match.fields) come first" in html


def test_free_text_is_in_order_of_how_far_the_score_of_the_verdict_tells_the_arms_apart() -> None:
    predictions = [
        free_text(0, 0.5, 0.5),
        free_text(1, 0.5, 0.6),
        free_text(2, 0.9, 0.1),
        free_text(3, 0.5, 0.5),
        free_text(4, 0.2, 0.7),
    ]
    html = render_report(ReportData(evaluation=evaluation(), predictions=predictions))
    assert re.findall(r"question (\d)", html) == ["2", "4", "1", "0", "3"]
    assert "3 on which tuned and few disagree (field_match.fields) come first" in html
