"""The learning curve of a report: the score of each part of the data, the line through them, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.client.curve_fit import CurvePoint, curve_points, fitted, more_data_words, point_rows
from luthier.client.escaping import escaped_html
from luthier.client.report_charts import curve_chart
from luthier.client.report_parts import estimate_cell, section, table
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob


def curve_section(evaluation: Evaluation, jobs: Mapping[str, FineTuningJob]) -> str:
    """Return the curve of an evaluation whose models learnt from parts of the data; empty where they did not.

    `jobs` made the models, by the models' names.
    """
    points = curve_points(evaluation, jobs)
    if not points:
        return ""
    words = f"<p><strong>{escaped_html(more_data_words(evaluation, points))}</strong></p>"
    how = (
        "<p>The line is fitted to the scores and the logarithm of the number of records, by least squares with the "
        "weights of the intervals; its interval is wider where the scores lie farther from it than these explain.</p>"
    )
    return section("Would more data help?", words + _chart(points) + _table(points) + how)


def _chart(points: Sequence[CurvePoint]) -> str:
    fit = fitted(points)
    line = [(point.num_records, fit.at(point.num_records)) for point in (points[0], points[-1])]
    return curve_chart([(point.num_records, point.estimate) for point in points], line)


def _table(points: Sequence[CurvePoint]) -> str:
    rows = [
        [escaped_html(arm_id), num_records, estimate_cell(score)]
        for num_records, arm_id, score in point_rows(points)
    ]
    return table(
        "Learning curve", ["Arm", "Records learnt from", points[0].estimate.score], rows, numbers_from=1
    )
