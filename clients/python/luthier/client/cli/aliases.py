"""`luthier aliases`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.deleting import pass_deletion
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from luthier.v1.model_alias_pb2 import AliasMove, Gate, ModelAlias

_SCORE_GATE = re.compile(r"(?P<score>[^<>=]+)(?P<side>>=|<=)(?P<limit>[^!]+)(?P<whole>!?)")


@click.group(cls=SuggestingGroup)
def aliases() -> None:
    """Name models by their role, e.g. production, and guard each move by gates."""


@aliases.command()
@click.argument("name", shell_complete=complete_names)
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="SCORE>=LIMIT[!]|SCORE<=LIMIT[!]|verdict=OUTCOME,...",
    help="What an evaluation must show: a score (with ! its whole interval), or one of some verdicts, e.g. "
    "field_match.record>=0.9 or verdict=fine-tune-wins,no-difference. [default: nothing]",
)
@pass_session
def create(session: Session, name: str, gates: tuple[str, ...]) -> None:
    """Create alias NAME. It stands for no model yet."""
    from luthier.v1.model_alias_pb2 import ModelAlias

    wanted = ModelAlias(gates=[_gate(text) for text in gates])
    created = session.client.aliases.create(wanted, model_alias_id=name)
    session.show(created, _facts)
    session.hint(f"aliases move {short(created.name)} MODEL --evaluation EVALUATION")


def _gate(text: str) -> Gate:
    from luthier.v1.model_alias_pb2 import Gate, ScoreGate, VerdictGate
    from luthier.v1.verdict_pb2 import EvaluationVerdict

    kind, _, outcomes = text.partition("=")
    try:
        if kind == "verdict":
            numbers = [
                EvaluationVerdict.Outcome.Value(f"OUTCOME_{one.strip().upper().replace('-', '_')}")
                for one in outcomes.split(",")
            ]
            return Gate(verdict=VerdictGate(outcomes=numbers))
        found = _SCORE_GATE.fullmatch(text)
        if found is None:
            raise ValueError(text)
        limit = float(found["limit"])
    except ValueError as error:
        problem = f"must be SCORE>=LIMIT, SCORE<=LIMIT or verdict=OUTCOME, got {text!r}"
        raise click.BadParameter(problem, param_hint="--gate") from error
    gate = ScoreGate(score=found["score"].strip(), whole_interval=bool(found["whole"]))
    if found["side"] == ">=":
        gate.least = limit
    else:
        gate.most = limit
    return Gate(score=gate)


@aliases.command("list")
@pass_session
def list_aliases(session: Session) -> None:
    """List the aliases, newest first."""
    session.show_list(session.client.aliases.list(), _table)


@aliases.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show an alias, the model it stands for, and what opened its gates."""
    session.show(session.client.aliases.get(name), _facts)


@aliases.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("model")
@click.option("--evaluation", default="", help="Evaluation of MODEL that opens the gates.")
@click.option("--etag", default="", help="Move it only if it still has this etag; `show --json` prints it.")
@pass_session
def move(session: Session, name: str, model: str, evaluation: str, etag: str) -> None:
    """Let alias NAME stand for MODEL. Refused, with the numbers, while a gate is shut."""
    session.show(session.client.aliases.move(name, model, evaluation=evaluation, etag=etag), _facts)


@aliases.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def history(session: Session, name: str) -> None:
    """Show what alias NAME stood for, from its first move."""
    session.show_list(session.client.aliases.moves(name), _move_table)


@aliases.command()
@pass_deletion
def delete(session: Session, name: str, etag: str) -> None:
    """Delete an alias, with its history. The model stays."""
    session.show_deleted(session.client.aliases.delete(name, etag=etag))


def _table(found: Iterable[ModelAlias]) -> Table:
    from luthier.client.cli.views import table, when

    made = table("NAME", "MODEL", "EVALUATION", "#GATES", "#MOVES", "MOVED (UTC)")
    for alias in found:
        made.add_row(
            short(alias.name),
            short(alias.current.model),
            short(alias.current.evaluation),
            str(len(alias.gates)),
            str(alias.current.number),
            when(alias.current.move_time),
        )
    return made


def _move_table(moves: Iterable[AliasMove]) -> Table:
    from luthier.client.cli.views import table, when

    made = table("#NUMBER", "MODEL", "DIGEST", "EVALUATION", "MOVED (UTC)")
    for one in moves:
        digest = one.model_digest[:12]
        made.add_row(str(one.number), short(one.model), digest, short(one.evaluation), when(one.move_time))
    return made


def _facts(alias: ModelAlias) -> Group:
    from rich.console import Group
    from rich.text import Text

    from luthier.client.cli.views import facts, mapping, when

    head = facts(
        [
            ("alias", short(alias.name)),
            ("model", short(alias.current.model)),
            ("digest", alias.current.model_digest),
            ("evaluation", short(alias.current.evaluation)),
            ("moved", when(alias.current.move_time)),
            ("moves", alias.current.number),
            ("labels", mapping(alias.labels)),
        ]
    )
    opened = [Text(f"gate open: {result.sentence}", "green") for result in alias.current.gates]
    wanted = [] if opened else [Text(f"gate: {_gate_words(gate)}") for gate in alias.gates]
    return Group(head, *opened, *wanted)


def _gate_words(gate: Gate) -> str:
    from luthier.v1.verdict_pb2 import EvaluationVerdict

    if gate.WhichOneof("gated") == "verdict":
        names = [EvaluationVerdict.Outcome.Name(one) for one in gate.verdict.outcomes]
        return "verdict=" + ",".join(
            name.removeprefix("OUTCOME_").lower().replace("_", "-") for name in names
        )
    score = gate.score
    is_least = score.WhichOneof("threshold") == "least"
    limit = score.least if is_least else score.most
    return f"{score.score}{'>=' if is_least else '<='}{limit:g}{'!' if score.whole_interval else ''}"
