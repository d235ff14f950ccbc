"""`luthier evaluations benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.session import Session, pass_session

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import ArmResult


@click.command()
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    help="Task by its name, or a YAML file of one; may be given again.",
)
@click.option(
    "--folder",
    "folders",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with tasks of yours; may be given again.",
)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="Records of each task. [default: all]")
@click.option("--shots", type=click.IntRange(min=0), help="Examples before each. [default: as the task says]")
@click.option("--chat", is_flag=True, help="Put questions in turns; for tasks that generate.")
@pass_session
def benchmark(
    session: Session,
    model: str,
    tasks: tuple[str, ...],
    folders: tuple[Path, ...],
    limit: int,
    shots: int | None,
    chat: bool,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, a checkpoint or an @alias. Needs luthier-client[lm-eval]."""
    from luthier.client.harness import LuthierLM, arm_result, run_tasks
    from luthier.client.names import short

    asked = LuthierLM(model, client=session.client)
    results = run_tasks(asked, tasks, folders=folders, limit=limit, num_shots=shots, chat=chat)
    session.show(arm_result(short(model), results), _table)


def _table(result: ArmResult) -> Table:
    from luthier.client.cli.views import table
    from luthier.client.scores import estimate_words

    made = table("SCORE", "#VALUE", "#RECORDS")
    for estimate in result.scores:
        made.add_row(estimate.score, estimate_words(estimate), f"{estimate.count:,}")
    return made
