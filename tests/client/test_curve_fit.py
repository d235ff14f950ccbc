"""The line through scores of parts of the data, and what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from luthier.client.curve_fit import CurvePoint, curve_points, fitted, more_data_words, point_rows
from luthier.client.learning_curve import curve_of
from luthier.client.report_curve import curve_section
from luthier.v1.evaluation_pb2 import (
    SCORE_DIRECTION_HIGHER_IS_BETTER,
    SCORE_DIRECTION_LOWER_IS_BETTER,
    SCORE_KIND_BINARY,
    SCORE_KIND_REAL,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    ArmResult,
    Comparison,
    Evaluation,
    EvaluationArm,
    ScoreEstimate,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob


def share(value: float, half: float = 0.05, name: str = "exact_match") -> ScoreEstimate:
    return ScoreEstimate(
        score=name,
        value=value,
        lower=value - half,
        upper=value + half,
        count=100,
        kind=SCORE_KIND_BINARY,
        direction=SCORE_DIRECTION_HIGHER_IS_BETTER,
    )


def loss(value: float, half: float) -> ScoreEstimate:
    return ScoreEstimate(
        score="perplexity",
        value=value,
        lower=value - half,
        upper=value + half,
        kind=SCORE_KIND_REAL,
        direction=SCORE_DIRECTION_LOWER_IS_BETTER,
    )


def points(*found: tuple[int, ScoreEstimate]) -> list[CurvePoint]:
    return [CurvePoint(arm_id=f"p{count}", num_records=count, estimate=one) for count, one in found]


def test_the_line_is_that_of_weighted_least_squares() -> None:
    found = points((100, share(0.3, 0.1)), (300, share(0.5, 0.05)), (1000, share(0.55, 0.02)))
    fit = fitted(found)
    errors = np.array([0.1, 0.05, 0.02]) / 1.959964
    slope, at_one = np.polyfit(np.log2([100, 300, 1000]), [0.3, 0.5, 0.55], 1, w=1 / errors)
    assert (fit.per_doubling, fit.at_one) == pytest.approx((slope, at_one))
    # They lie farther from a line than their intervals explain: residuals scale its interval.
    _, covariance = np.polyfit(np.log2([100, 300, 1000]), [0.3, 0.5, 0.55], 1, w=1 / errors, cov=True)
    assert fit.upper - fit.per_doubling == pytest.approx(1.959964 * math.sqrt(covariance[0, 0]), rel=1e-5)
    assert fit.at(1000) == pytest.approx(at_one + slope * math.log2(1000))


def test_scores_that_lie_on_a_line_leave_its_interval_to_their_own() -> None:
    fit = fitted(points((100, share(0.30, 0.1)), (200, share(0.41, 0.05)), (400, share(0.50, 0.02))))
    errors = np.array([0.1, 0.05, 0.02]) / 1.959964
    _, covariance = np.polyfit(np.log2([100, 200, 400]), [0.30, 0.41, 0.50], 1, w=1 / errors, cov="unscaled")
    assert fit.upper - fit.per_doubling == pytest.approx(1.959964 * math.sqrt(covariance[0, 0]), rel=1e-5)


def test_a_score_without_a_spread_does_not_hold_the_line_alone() -> None:
    fit = fitted(points((8, share(0.0, 0.1)), (16, share(0.5, 0.0)), (32, share(1.0, 0.1))))
    assert fit.per_doubling == pytest.approx(0.5)
    assert fit.upper > fit.per_doubling


@pytest.mark.parametrize(
    ("found", "begins"),
    [
        (
            [(100, share(0.2)), (200, share(0.4)), (400, share(0.6))],
            "More data would help, if the last step goes on: at 800 records exact_match would be 80.0 %. From 200 to "
            "400 records: +20.0 pp",
        ),
        (
            [(100, share(0.50)), (200, share(0.51)), (400, share(0.51))],
            "Whether more data would help is not seen in the last step. From 200 to 400 records: +0.0 pp",
        ),
        (
            [(100, share(0.2)), (200, share(0.8)), (400, share(0.8))],
            "Whether more data would help is not seen in the last step.",
        ),
        ([(100, share(0.6)), (400, share(0.2))], "More data made exact_match worse in the last step."),
        (
            [(100, loss(9.0, 0.1)), (400, loss(5.0, 0.1))],
            "More data would help, if the last step goes on: at 800 records perplexity would be 3.",
        ),
        ([(100, loss(5.0, 0.1)), (400, loss(9.0, 0.1))], "More data made perplexity worse"),
    ],
)
def test_the_words_say_what_the_last_step_brought(
    found: list[tuple[int, ScoreEstimate]], begins: str
) -> None:
    assert more_data_words(Evaluation(), points(*found)).startswith(begins)


def test_scores_without_an_interval_show_no_step() -> None:
    words = more_data_words(Evaluation(), points((100, loss(9.0, 0.0)), (400, loss(5.0, 0.0))))
    assert words.startswith(
        "Whether more data would help is not seen in the last step. From 100 to 400 records: -4, inconclusive. Over "
        "all parts each doubling has changed perplexity by -2. "
    )


def test_a_share_is_never_foretold_beyond_all() -> None:
    words = more_data_words(Evaluation(), points((100, share(0.5, 0.01)), (200, share(0.9, 0.01))))
    assert "at 400 records exact_match would be 100.0 %. " in words
    assert words.endswith("how much another run would change is not in them.")


def curve(*scores: float) -> tuple[Evaluation, dict[str, FineTuningJob]]:
    counts = (30, 100, 300)
    arms = [EvaluationArm(arm_id="zero", model="base")]
    results = [ArmResult(arm_id="zero", scores=[share(0.1)])]
    jobs = {}
    for count, value in zip(counts, scores, strict=True):
        arms.append(EvaluationArm(arm_id=f"p{count}", model=f"m{count}"))
        results.append(ArmResult(arm_id=f"p{count}", scores=[share(value)]))
        jobs[f"m{count}"] = FineTuningJob(labels={"learning-curve-records": str(count)})
    step = Comparison(
        candidate_arm_id="p300",
        baseline_arm_id="p100",
        score="exact_match",
        difference=0.2,
        lower=0.1,
        upper=0.3,
        kind=SCORE_KIND_BINARY,
        verdict=VERDICT_BETTER,
    )
    evaluation = Evaluation(arms=arms, arm_results=results, primary_score="exact_match", comparisons=[step])
    return evaluation, jobs


def test_points_are_the_arms_whose_jobs_say_their_records() -> None:
    evaluation, jobs = curve(0.2, 0.4, 0.6)
    found = curve_points(evaluation, jobs)
    assert [(one.arm_id, one.num_records) for one in found] == [("p30", 30), ("p100", 100), ("p300", 300)]
    assert point_rows(found)[0] == ("30", "p30", "20.0 % [15.0, 25.0]")
    said = more_data_words(evaluation, found)
    assert "From 100 to 300 records: +20.0 pp [+10.0, +30.0], better. " in said
    evaluation.comparisons[0].verdict = VERDICT_INCONCLUSIVE
    assert more_data_words(evaluation, found).startswith("Whether more data would help is not seen"), "paired"
    jobs["m30"].labels["learning-curve-records"] = "some"
    del jobs["m100"]
    assert curve_points(evaluation, jobs) == []


def test_the_report_shows_the_curve_where_there_is_one() -> None:
    evaluation, jobs = curve(0.2, 0.4, 0.6)
    text = curve_section(evaluation, jobs)
    assert "Would more data help?" in text
    assert text.count('class="estimate"') == 3
    assert 'aria-label="exact_match by records learnt from, with 95 % intervals"' in text
    assert "<td>p300</td>" in text
    assert curve_section(evaluation, {}) == ""


def test_an_evaluation_without_points_says_so_once_its_jobs_are_paid_for() -> None:
    evaluation, jobs = curve(0.2, 0.4, 0.6)
    evaluation.name, evaluation.primary_score = "projects/p/evaluations/more", "bleu"
    found = curve_of(evaluation, curve_points(evaluation, jobs))
    assert (found.points, found.fit) == ([], None)
    assert found.words == (
        "No curve: fewer than two of its models have a score bleu in projects/p/evaluations/more."
    )
    evaluation.primary_score = "exact_match"
    assert curve_of(evaluation, curve_points(evaluation, jobs)).fit is not None
