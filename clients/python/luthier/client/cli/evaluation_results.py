"""`luthier evaluations compare`, `diff`, `export` and `report`: what an evaluation that ended shows."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group

    from luthier.client.disagreements import Contest
    from luthier.v1.evaluation_pb2 import Evaluation, Prediction


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.option("--score", "scores", multiple=True, help="A score to compare on. [default: all]")
@pass_session
def compare(session: Session, name: str, scores: tuple[str, ...]) -> None:
    """Show the verdict of an evaluation in a sentence, and every comparison behind it."""
    from luthier.client.scores import scores_of

    found = session.client.evaluations.get(name)
    known = scores_of(found)
    for score in scores:
        if score not in known:
            problem = f"must be one of {', '.join(known) or 'none'}, got {score!r}"
            raise click.BadParameter(problem, param_hint="--score")
    if scores:
        kept = [one for one in found.comparisons if one.score in scores]
        del found.comparisons[:]
        found.comparisons.extend(kept)
    session.show(found, _compared)
    session.hint(f"evaluations diff {short(found.name)}")


def _compared(evaluation: Evaluation) -> Group:
    from rich.console import Group

    from luthier.client.cli.evaluation_views import comparison_table, verdict_parts

    return Group(*verdict_parts(evaluation), comparison_table(evaluation.comparisons))


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("others", nargs=-1, metavar="[CANDIDATE BASELINE | OTHER[:ARM]]")
@click.option(
    "--score",
    default="",
    help="Score that tells. [default: that of the verdict, else whether the whole answer is right]",
)
@click.option(
    "--only",
    type=click.Choice(["gained", "lost", "differs"]),
    help="Records on which CANDIDATE is better, or BASELINE. [default: all on which they disagree]",
)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Records to show.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write them all to a file in place of showing some: .jsonl or .parquet.",
)
@pass_session
def diff(
    session: Session,
    name: str,
    others: tuple[str, ...],
    score: str,
    only: str | None,
    limit: int,
    output: Path | None,
) -> None:
    """Show where two arms disagree: CANDIDATE and BASELINE of an evaluation, by default those of its verdict.

    With OTHER, a second evaluation of the same dataset version, an arm of each: NAME:ARM, or those that were judged.
    """
    from luthier.client.cli.evaluation_views import disagreement_table
    from luthier.client.disagreements import disagreements

    contest, predictions = _contest(session, name, others, score)
    if contest.passed_over:
        session.note(f"{contest.told_by} tells, not the score of the verdict: {contest.passed_over}")
    found = (one for one in disagreements(predictions, contest) if only is None or one.side == only)
    if output is not None:
        _write(session, (one.prediction for one in found), output)
        return
    if session.for_programs:
        session.show_list((one.prediction for one in islice(found, limit)), disagreement_table)
        return
    shown = disagreement_table(islice(found, limit))
    if shown.row_count:
        session.out.print(shown)
    else:
        way = f"{contest.told_by}, {only}" if only else contest.told_by
        session.note(f"{contest.candidate} and {contest.baseline} disagree on no record ({way})")


def _contest(
    session: Session, name: str, others: tuple[str, ...], score: str
) -> tuple[Contest, Iterator[Prediction]]:
    """Return who is compared by what, and the records with the answers of both. Raises UsageError."""
    from luthier.client.disagreements import contest_of
    from luthier.client.verdicts import judged_arms
    from luthier.errors import InvalidArgument

    if len(others) > 2:
        raise click.UsageError(f"give two arms at most, got {len(others)}: {' '.join(others)}")
    try:
        if len(others) == 1:
            return _across(session, name, others[0], score)
        evaluation = session.client.evaluations.get(name)
        candidate, baseline = others or judged_arms(evaluation)
        contest = contest_of(evaluation, candidate, baseline, score)
    except InvalidArgument as error:
        raise click.UsageError(error.message) from error
    return contest, session.client.evaluations.predictions(evaluation.name, page_size=200)


def _across(session: Session, name: str, other: str, score: str) -> tuple[Contest, Iterator[Prediction]]:
    from luthier.client.common_records import common_records, contest_between, entrant

    evaluations = session.client.evaluations
    named, _, arm = name.partition(":")
    evaluation = evaluations.get(named)
    if other in (one.arm_id for one in evaluation.arms):
        raise click.UsageError(
            f"give both CANDIDATE and BASELINE, or neither, got the arm {other!r} alone; another evaluation "
            f"of that name is given with its arm, {other}:ARM"
        )
    other_named, _, other_arm = other.partition(":")
    candidate, baseline = entrant(evaluation, arm), entrant(evaluations.get(other_named), other_arm)
    contest = contest_between(candidate, baseline, score)
    asked, before = (
        evaluations.predictions(one.evaluation.name, page_size=200) for one in (candidate, baseline)
    )
    return contest, common_records(candidate, asked, baseline, before)


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File to write: .jsonl or .parquet.",
)
@pass_session
def export(session: Session, name: str, output: Path) -> None:
    """Write every answer of an evaluation to a file, a row for each record and arm."""
    from luthier.client.partial_answers import early_end

    evaluation = session.client.evaluations.get(name)
    _write(session, session.client.evaluations.predictions(evaluation.name, page_size=200), output)
    if ended := early_end(evaluation):
        session.note(f"only some of its answers, as it ended early: {ended}")


def _write(session: Session, predictions: Iterator[Prediction], output: Path) -> None:
    from luthier.client.prediction_files import SUFFIXES, write_predictions

    if output.suffix not in SUFFIXES:
        problem = f"must end with {' or '.join(SUFFIXES)}, got {output.name!r}"
        raise click.BadParameter(problem, param_hint="--output")
    count = write_predictions(predictions, output)
    session.note(f"{count:,} rows")
    click.echo(output)


@click.command()
@click.argument("name", shell_complete=complete_names)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
)
@pass_session
def report(session: Session, name: str, output: Path) -> None:
    """Write an HTML report.

    The verdict, scores with intervals, loss curve, answers side by side. One file, opens anywhere.
    """
    from luthier.client.report import collect_report, render_report

    output.write_text(render_report(collect_report(session.client, name)), encoding="utf-8")
    click.echo(output)
