"""`luthier jobs learning-curve`: would more data help?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from luthier.client.cli.arms import arm_of
from luthier.client.cli.drafts import Draft, pass_draft
from luthier.client.cli.evaluations import METRICS
from luthier.client.cli.job_drafts import drafted_job, job_kind, job_options
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group

    from luthier.client.learning_curve import LearningCurve
    from luthier.v1.evaluation_pb2 import Evaluation
    from luthier.v1.fine_tuning_job_pb2 import FineTuningJob


@click.command("learning-curve")
@job_options
@click.option(
    "--name", required=True, help="Id of the curve; datasets, renderings, jobs and models begin with it."
)
@click.option(
    "--share",
    "shares",
    type=click.FloatRange(min=0, min_open=True, max=1),
    multiple=True,
    default=(0.1, 0.3, 1.0),
    show_default=True,
    help="A part of the train records to tune on.",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="ID=MODEL[:SHOTS[:similar]]",
    help="An arm beside the tuned ones, e.g. base-3=smollm2:3.",
)
@click.option(
    "--metric", "metrics", multiple=True, type=click.Choice(METRICS), help="Scores, as evaluations have."
)
@click.option(
    "--eval-max-records", type=click.IntRange(min=0), default=0, help="Records asked at most. [default: all]"
)
@click.option(
    "--eval-max-new-tokens", type=click.IntRange(min=0), default=0, help="Longest answer. [default: 256]"
)
@click.option("--primary-score", default="", help="Score of the curve. [default: that of the first metric]")
@pass_session
@pass_draft(job_kind)
def learning_curve(
    session: Session,
    draft: Draft[FineTuningJob],
    reinforcement: str | None,
    *,
    full: bool,
    reward_model: bool,
    name: str,
    shares: tuple[float, ...],
    **wanted: Any,
) -> None:
    """Tune on parts of the data, evaluate all models on the same records, and say whether more data would help.

    The job is given as to `jobs create`. After a break the same command goes on where it was.
    """
    job = drafted_job(draft, reinforcement, full=full, reward_model=reward_model)
    tell = None if session.for_programs else session.note
    found = session.client.learning_curve(job, _evaluation(**wanted), curve_id=name, shares=shares, tell=tell)
    session.show(found.evaluation, lambda _: _facts(found))
    session.hint(f"evaluations report {short(found.evaluation.name)} --output report.html")


def _evaluation(
    *,
    arms: tuple[str, ...],
    metrics: tuple[str, ...],
    eval_max_records: int,
    eval_max_new_tokens: int,
    primary_score: str,
) -> Evaluation:
    from luthier.v1.evaluation_pb2 import Evaluation, EvaluationMetric

    names = [f"EVALUATION_METRIC_{metric.upper().replace('-', '_')}" for metric in metrics]
    return Evaluation(
        arms=[arm_of(text) for text in arms],
        metrics=[EvaluationMetric.Value(one) for one in names],
        max_records=eval_max_records,
        max_new_tokens=eval_max_new_tokens,
        primary_score=primary_score,
    )


def _facts(found: LearningCurve) -> Group:
    from rich.console import Group
    from rich.text import Text

    from luthier.client.cli.evaluation_views import evaluation_facts
    from luthier.client.cli.views import table
    from luthier.client.curve_fit import point_rows

    made = table("#RECORDS", "ARM", f"#{found.points[0].estimate.score}" if found.points else "#SCORE")
    for row in point_rows(found.points):
        made.add_row(*row)
    return Group(Text(found.words, "bold"), made, Text(""), evaluation_facts(found.evaluation))
