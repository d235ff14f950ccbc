"""`luthier evaluations`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import click

from luthier.client.cli.arms import pass_arms
from luthier.client.cli.benchmarks import benchmark
from luthier.client.cli.completing import complete_names, names_in
from luthier.client.cli.deleting import add_deleting, deleted_option
from luthier.client.cli.drafts import Draft, field_option, pass_draft
from luthier.client.cli.evaluation_results import compare, diff, export, report
from luthier.client.cli.grading import grade
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.message_options import grader_option, judge_option
from luthier.client.cli.notifying import delivery_table, notify_option
from luthier.client.cli.opening import open_evaluation
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import Evaluation
    from luthier.v1.verdict_pb2 import Guard


@click.group(cls=SuggestingGroup)
def evaluations() -> None:
    """Compare models and prompts on the same held-out records."""


for command in (grade, compare, diff, export, report, benchmark, open_evaluation):
    evaluations.add_command(command)


METRICS = (
    "exact-match",
    "field-match",
    "perplexity",
    "bits-per-byte",
    "multiple-choice",
    "preference",
    "reward-model",
    "answer-length",
    "stop-rate",
    "prompt-tokens",
    "chrf",
    "bleu",
    "rouge",
)
"""As they are typed."""


def _kind() -> type[Evaluation]:
    from luthier.v1.evaluation_pb2 import Evaluation

    return Evaluation


@evaluations.command()
@field_option(
    "--version",
    field="dataset_version",
    shell_complete=names_in("versions"),
    help="Dataset version, DATASET/VERSION.  [required, if not in a file]",
)
@field_option(
    "--arm",
    "arms",
    field="arms",
    is_read=False,
    multiple=True,
    metavar="ID=MODEL[:SHOTS[:similar]]",
    help="A contender, e.g. base-3=smollm2:3, or base-3=smollm2:3:similar with the examples most like each question.  "
    "[required, if not in a file]",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="ID=FILE|base|taught",
    help="Ask an arm with the template in FILE, the base model's own, or the one that the first tuned arm was taught "
    "with. [default: a tuned model as it was taught, a base model with its own]",
)
@click.option(
    "--system-prompt",
    "system_prompts",
    multiple=True,
    metavar="ID=TEXT|@FILE",
    help="Ask an arm under this system prompt. [default: the system turn that each record has]",
)
@field_option(
    "--metric",
    field="metrics",
    multiple=True,
    type=click.Choice(METRICS),
    help="Scores. [default: exact-match and perplexity; of pairs preference too]",
)
@field_option(
    "--choice",
    field="choices",
    multiple=True,
    help="An answer that multiple-choice chooses between. [default: the references that the records have]",
)
@field_option(
    "--reward-model",
    field="reward_model",
    help="What the metric reward-model values answers with, MODEL or JOB/CHECKPOINT.",
)
@field_option(
    "--split",
    field="split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
)
@field_option(
    "--base-precision",
    field="base_precision",
    type=click.Choice(["bfloat16", "int8", "nf4"]),
    help="What the base model is held in for all arms. [default: as the adapters were trained]",
)
@field_option(
    "--max-records",
    field="max_records",
    type=click.IntRange(min=0),
    help="Records asked at most. [default: all]",
)
@field_option(
    "--max-new-tokens",
    field="max_new_tokens",
    type=click.IntRange(min=0),
    help="Longest answer. [default: 256]",
)
@field_option(
    "--seed", field="seed", type=int, help="Seed of the choice of records and examples. [default: 0]"
)
@field_option(
    "--primary-score",
    field="primary_score",
    help="Score that the verdict is about, e.g. field_match.fields. [default: that of the first metric]",
)
@field_option(
    "--smallest-difference",
    field="smallest_difference",
    type=click.FloatRange(min=0),
    help="Smallest difference of that score that matters: 0.02 is two percentage points. [default: not said]",
)
@field_option(
    "--candidate", field="candidate_arm_id", help="The arm that is judged. [default: the last tuned]"
)
@field_option(
    "--guard",
    "guards",
    field="guards",
    is_read=False,
    multiple=True,
    metavar="SCORE=LOSS[:ARM]|drift=LEAST",
    help="A score that may lose at most LOSS against ARM, or the share of general abilities that --drift must find "
    "retained. [default of ARM: every prompting arm]",
)
@field_option(
    "--drift",
    field="drift",
    is_flag=True,
    flag_value="{}",
    default=None,
    help="Measure what the tuned arms have forgotten of what a prompting arm can do.",
)
@field_option(
    "--drift-baseline",
    field="drift.baseline_arm_id",
    help="The arm that they are held against; measures drift. [default: the first prompting arm]",
)
@grader_option
@judge_option
@field_option(
    "--drift-version",
    field="drift.dataset_version",
    help="Dataset version whose records are asked in place of the general suite; measures drift.",
)
@field_option(
    "--max-workers",
    field="max_workers",
    type=click.IntRange(min=0),
    help="Workers that arms and records are dealt to at most, 1 to 64; the result is the same. [default: 1]",
)
@notify_option
@click.option("--name", default="", help="Id of the evaluation. [default: made by the service]")
@click.option("--watch", "watches", is_flag=True, help="Watch the evaluation until it is done.")
@pass_session
@pass_draft(_kind)
@pass_arms
def create(
    session: Session, draft: Draft[Evaluation], name: str, watches: bool, guards: tuple[str, ...]
) -> None:
    """Start an evaluation of the given arms on the same records."""
    if guards:
        del draft.message.guards[:]
        draft.message.guards.extend(_guard(text) for text in guards)
    created = session.client.evaluations.create(draft.finish(), evaluation_id=name)
    if watches:
        _watch(session, created.name)
        return
    session.show(created, _facts)
    session.hint(f"evaluations watch {short(created.name)}")


def _guard(text: str) -> Guard:
    from luthier.v1.verdict_pb2 import DriftGuard, Guard, ScoreGuard

    score, _, limit = text.partition("=")
    amount, colon, arm_id = limit.partition(":")
    try:
        number = float(amount)
    except ValueError as error:
        raise _no_guard(text) from error
    if score != "drift":
        return Guard(score=ScoreGuard(score=score, max_loss=number, baseline_arm_id=arm_id))
    if colon:
        raise _no_guard(text)
    return Guard(drift=DriftGuard(min_retained=number))


def _no_guard(text: str) -> click.BadParameter:
    problem = f"must be SCORE=LOSS, SCORE=LOSS:ARM or drift=LEAST, got {text!r}"
    return click.BadParameter(problem, param_hint="--guard")


@evaluations.command("list")
@deleted_option
@pass_session
def list_evaluations(session: Session, deleted: bool) -> None:
    """List the evaluations, newest first."""
    session.show_list(session.client.evaluations.list(show_deleted=deleted), _table)


@evaluations.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show an evaluation: scores with 95 % confidence intervals, and what each pair of arms shows."""
    session.show(session.client.evaluations.get(name), _facts)


@evaluations.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def watch(session: Session, name: str) -> None:
    """Watch an evaluation until it is done. Exit code 6 when it fails."""
    _watch(session, name)


def _watch(session: Session, name: str) -> None:
    from luthier.client.cli.following import watch as watch_resource

    stop = f"evaluations cancel {short(name)}"
    done = watch_resource(session, name, session.client.evaluations.wait, stop=stop)
    if session.form == "name":
        session.show(done, _facts)
    if not session.for_programs:
        session.show(done, _facts)
        session.hint(f"evaluations report {short(name)} --output report.html")


@evaluations.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask an evaluation to stop."""
    session.show(session.client.evaluations.cancel(name), _facts)


add_deleting(
    evaluations,
    lambda session, _: session.client.evaluations,
    "Delete an evaluation that has ended, with its predictions.",
)


@evaluations.command()
@click.argument("name", shell_complete=complete_names)
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Records to show.")
@pass_session
def predictions(session: Session, name: str, limit: int) -> None:
    """Show what each arm answered, record by record, beside the right answer."""
    from luthier.client.cli.evaluation_views import prediction_table

    found = session.client.evaluations.predictions(name, page_size=min(limit, 1000))
    session.show_list(islice(found, limit), prediction_table)


@evaluations.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def deliveries(session: Session, name: str) -> None:
    """Show what became of telling an evaluation's webhooks that it has ended."""
    session.show_list(session.client.evaluations.deliveries(name), delivery_table)


def _table(evaluations: Iterable[Evaluation]) -> Table:
    from luthier.client.cli.evaluation_views import evaluation_table

    return evaluation_table(evaluations)


def _facts(evaluation: Evaluation) -> Group:
    from luthier.client.cli.evaluation_views import evaluation_facts

    return evaluation_facts(evaluation)
