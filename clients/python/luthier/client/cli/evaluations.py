"""`luthier evaluations`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.client.cli.deleting import pass_deletion
from luthier.client.cli.drafts import Draft, field_option, pass_draft
from luthier.client.cli.grading import grade
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, Prediction

_VERDICT_STYLES = {"better": "bold green", "worse": "bold red"}


@click.group(cls=SuggestingGroup)
def evaluations() -> None:
    """Compare models and prompts on the same held-out records."""


evaluations.add_command(grade)


def _kind() -> type[Evaluation]:
    from luthier.v1.evaluation_pb2 import Evaluation

    return Evaluation


@evaluations.command()
@field_option(
    "--version",
    field="dataset_version",
    help="Dataset version, DATASET/VERSION.  [required, if not in a file]",
)
@field_option(
    "--arm",
    "arms",
    field="arms",
    is_read=False,
    multiple=True,
    metavar="ID=MODEL[:SHOTS]",
    help="A contender, e.g. base-3=smollm2:3.  [required, if not in a file]",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="ID=FILE|base|taught",
    help="Ask an arm with the template in FILE, the base model's own, or the one that the first tuned arm was taught "
    "with. [default: a tuned model as it was taught, a base model with its own]",
)
@field_option(
    "--metric",
    field="metrics",
    multiple=True,
    type=click.Choice(["exact-match", "field-match", "perplexity"]),
    help="Scores. [default: exact-match]",
)
@field_option(
    "--split",
    field="split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
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
    "--max-workers",
    field="max_workers",
    type=click.IntRange(min=0),
    help="Workers that arms and records are dealt to at most, 1 to 64; the result is the same. [default: 1]",
)
@click.option("--name", default="", help="Id of the evaluation. [default: made by the service]")
@click.option("--watch", "watches", is_flag=True, help="Watch the evaluation until it is done.")
@pass_session
@pass_draft(_kind)
def create(
    session: Session,
    draft: Draft[Evaluation],
    name: str,
    watches: bool,
    arms: tuple[str, ...],
    templates: tuple[str, ...],
) -> None:
    """Start an evaluation of the given arms on the same records."""
    if arms:
        del draft.message.arms[:]
        draft.message.arms.extend(_arm(text) for text in arms)
    _choose_templates(draft.message.arms, templates)
    created = session.client.evaluations.create(draft.finish(), evaluation_id=name)
    if watches:
        _watch(session, created.name)
        return
    session.show(created, _facts)
    session.hint(f"evaluations watch {short(created.name)}")


def _arm(text: str) -> EvaluationArm:
    from luthier.v1.evaluation_pb2 import EvaluationArm

    arm_id, equals, contender = text.partition("=")
    model, colon, shots = contender.partition(":")
    if not equals or not arm_id or not model or (colon and not shots.isdecimal()):
        raise click.BadParameter(f"must be ID=MODEL or ID=MODEL:SHOTS, got {text!r}", param_hint="--arm")
    return EvaluationArm(arm_id=arm_id, model=model, num_shots=int(shots or 0))


def _choose_templates(arms: Iterable[EvaluationArm], templates: Iterable[str]) -> None:
    from luthier.v1.evaluation_pb2 import ARM_TEMPLATE_BASE, ARM_TEMPLATE_TAUGHT

    chosen = {"base": ARM_TEMPLATE_BASE, "taught": ARM_TEMPLATE_TAUGHT}
    by_id = {arm.arm_id: arm for arm in arms}
    for text in templates:
        arm_id, _, template = text.partition("=")
        if arm_id not in by_id or not template:
            known = ", ".join(by_id)
            problem = f"must be ID=FILE, ID=base or ID=taught with an ID of {known}, got {text!r}"
            raise click.BadParameter(problem, param_hint="--template")
        if template in chosen:
            by_id[arm_id].template = chosen[template]
            continue
        try:
            by_id[arm_id].chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"must be a file of text: {error}", param_hint="--template") from error


@evaluations.command("list")
@pass_session
def list_evaluations(session: Session) -> None:
    """List the evaluations, newest first."""
    session.show_list(session.client.evaluations.list(), _table)


@evaluations.command()
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show an evaluation: scores with 95 % confidence intervals, and what each pair of arms shows."""
    session.show(session.client.evaluations.get(name), _facts)


@evaluations.command()
@click.argument("name")
@pass_session
def watch(session: Session, name: str) -> None:
    """Watch an evaluation until it is done. Exit code 6 when it fails."""
    _watch(session, name)


def _watch(session: Session, name: str) -> None:
    from luthier.client.cli.following import watch as watch_resource

    stop = f"evaluations cancel {short(name)}"
    done = watch_resource(session, name, session.client.evaluations.wait, stop=stop)
    if not session.as_json:
        session.show(done, _facts)
        session.hint(f"evaluations report {short(name)} --output report.html")


@evaluations.command()
@click.argument("name")
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask an evaluation to stop."""
    session.show(session.client.evaluations.cancel(name), _facts)


@evaluations.command()
@pass_deletion
def delete(session: Session, name: str, etag: str) -> None:
    """Delete an evaluation that has ended, with its predictions."""
    session.show_deleted(session.client.evaluations.delete(name, etag=etag))


@evaluations.command()
@click.argument("name")
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Records to show.")
@pass_session
def predictions(session: Session, name: str, limit: int) -> None:
    """Show what each arm answered, record by record, beside the right answer."""
    found = session.client.evaluations.predictions(name, page_size=min(limit, 1000))
    session.show_list(islice(found, limit), _prediction_table)


@evaluations.command()
@click.argument("name")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
)
@pass_session
def report(session: Session, name: str, output: Path) -> None:
    """Write an HTML report.

    Loss curve, scores with intervals, answers side by side. One file, opens anywhere.
    """
    from luthier.client.report import collect_report, render_report

    output.write_text(render_report(collect_report(session.client, name)), encoding="utf-8")
    click.echo(output)


def _table(evaluations: Iterable[Evaluation]) -> Table:
    from luthier.client.cli.views import state, table, when

    made = table("NAME", "STATE", "VERSION", "ARMS", "#RECORDS", "CREATED (UTC)")
    for evaluation in evaluations:
        made.add_row(
            short(evaluation.name),
            state(evaluation),
            short(evaluation.dataset_version),
            ", ".join(arm.arm_id for arm in evaluation.arms),
            str(evaluation.num_records or ""),
            when(evaluation.create_time),
        )
    return made


def _facts(evaluation: Evaluation) -> Group:
    from rich.console import Group
    from rich.text import Text

    from luthier.client.askings import asked_with
    from luthier.client.cli.views import facts, failure, split_name, state, waiting
    from luthier.client.scores import text_form_words

    head = facts(
        [
            ("evaluation", short(evaluation.name)),
            ("state", state(evaluation)),
            ("failure", failure(evaluation)),
            ("waiting", waiting(evaluation)),
            ("version", f"{short(evaluation.dataset_version)} {split_name(evaluation.split)}"),
            ("records", evaluation.num_records),
            ("text compared in", text_form_words(evaluation)),
            ("arms", ", ".join(f"{a.arm_id}={short(a.model)}:{a.num_shots}" for a in evaluation.arms)),
        ]
    )
    asked = [(f"asked {result.arm_id}", asked_with(result)) for result in evaluation.arm_results]
    parts: list[Any] = [head, *(Text(f"warning: {warning}", "yellow") for warning in evaluation.warnings)]
    if any(words for _, words in asked):
        parts.append(facts(asked))
    for made in (_score_table(evaluation), _comparison_table(evaluation)):
        if made.row_count:
            parts += [Text(""), made]
    return Group(*parts)


def _score_table(evaluation: Evaluation) -> Table:
    """A row for each score, a column for each arm: estimate and 95 % interval."""
    from luthier.client.cli.views import table
    from luthier.client.scores import estimate_words, lower_is_better, scores_of

    made = table("SCORE", *(f"#{result.arm_id}" for result in evaluation.arm_results))
    for score in scores_of(evaluation):
        found = [
            next((entry for entry in result.scores if entry.score == score), None)
            for result in evaluation.arm_results
        ]
        better = " (lower is better)" if any(entry and lower_is_better(entry) for entry in found) else ""
        made.add_row(f"{score}{better}", *(estimate_words(entry) if entry else "" for entry in found))
    if any(result.num_errors for result in evaluation.arm_results):
        made.add_row(
            "records without an answer", *(str(result.num_errors) for result in evaluation.arm_results)
        )
    return made


def _comparison_table(evaluation: Evaluation) -> Table:
    from rich.text import Text

    from luthier.client.cli.views import table
    from luthier.client.scores import difference_words, verdict_word

    made = table("SCORE", "COMPARED", "#DIFFERENCE", "#P", "#PAIRS", "VERDICT")
    for entry in evaluation.comparisons:
        word = verdict_word(entry.verdict)
        made.add_row(
            entry.score,
            f"{entry.candidate_arm_id} - {entry.baseline_arm_id}",
            difference_words(entry),
            f"{entry.p_value:.2g}" if entry.HasField("p_value") else "",
            str(entry.count),
            Text(word, _VERDICT_STYLES.get(word, "yellow")),
        )
    return made


def _prediction_table(predictions: Iterable[Prediction]) -> Table:
    from rich.text import Text

    from luthier.client.cli.views import table
    from luthier.client.scores import is_right

    made = table("#ROW", "WHO", "", "ANSWER")
    for prediction in predictions:
        question = prediction.prompt[-1].content if prediction.prompt else ""
        made.add_row(str(prediction.row), "question", "", Text(question, "dim"))
        made.add_row("", "reference", "", prediction.reference)
        for answer in prediction.answers:
            if answer.HasField("error"):
                why = f"{prediction.filename}:{prediction.line}: {answer.error.message}"
                made.add_row("", answer.arm_id, Text("!", "red"), Text(why, "red"))
                continue
            right = is_right(answer)
            mark = Text("") if right is None else Text("\u2713", "green") if right else Text("\u2717", "red")
            made.add_row("", answer.arm_id, mark, answer.text)
    return made
