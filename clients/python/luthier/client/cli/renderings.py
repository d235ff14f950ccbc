"""`luthier renderings`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, TextIO

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.deleting import add_deleting, deleted_option
from luthier.client.cli.drafts import Draft, FieldArgument, field_option, pass_draft
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from luthier.v1.rendering_pb2 import RenderedRow, Rendering

_KIND = "RENDERING_KIND_"
_SHOWN_ERRORS = 20
_SHOWN_RECORDS = 10


@click.group(cls=SuggestingGroup)
def renderings() -> None:
    """Turn a version into the exact tokens and loss masks that a job trains on, and preview them."""


def _kind() -> type[Rendering]:
    from luthier.v1.rendering_pb2 import Rendering

    return Rendering


@renderings.command()
@click.argument("version", cls=FieldArgument, field="dataset_version")
@field_option(
    "--model",
    field="model",
    help="Model whose tokenizer and chat template are used.  [required, if not in a file]",
)
@click.option("--name", default="", help="Id of the rendering. [default: made by the service]")
@field_option(
    "--kind",
    field="kind",
    type=click.Choice(["supervised", "preference", "unpaired", "prompt"]),
    help="What records become: answers to learn, pairs, labelled answers, or prompts. [default: supervised]",
)
@field_option(
    "--mask",
    field="mask_mode",
    type=click.Choice(["all-assistant-turns", "last-turn", "message-weight", "completion"]),
    help="Which tokens are learnt. [default: assistant turns or completion]",
)
@field_option(
    "--max-tokens",
    field="max_tokens",
    type=click.IntRange(min=1),
    help="Longest row. [default: the model's context]",
)
@field_option(
    "--length-policy",
    field="length_policy",
    type=click.Choice(["drop", "truncate", "fail"]),
    help="For longer records. [default: drop]",
)
@click.option(
    "--chat-template",
    "--template",
    "template",
    metavar="FILE",
    type=click.File(encoding="utf-8"),
    help="Jinja chat template in place of the model's.",
)
@field_option(
    "--split-turns",
    field="split_turns",
    is_flag=True,
    help="One row for each answer, as the model will see it when it is asked for it.",
)
@field_option(
    "--template-errors",
    field="template_error_policy",
    type=click.Choice(["strict", "skip"]),
    help="What records do that cannot be rendered: fail all, or be left out. [default: strict]",
)
@pass_session
@pass_draft(_kind)
def create(session: Session, draft: Draft[Rendering], name: str, template: TextIO | None) -> None:
    """Render VERSION (DATASET/VERSION) with a model's tokenizer."""
    from luthier.v1.rendering_pb2 import RENDERING_KIND_SUPERVISED, RENDERING_KIND_UNSPECIFIED

    if template is not None:
        draft.message.chat_template = template.read()
    started = session.client.renderings.create(draft.finish(), rendering_id=name)
    done = _finished(session, started.name)
    session.show(done, _facts)
    if done.num_errors:
        session.hint(f"renderings errors {short(done.name)}")
    session.hint(f"renderings preview {short(done.name)}")
    if done.kind in (RENDERING_KIND_UNSPECIFIED, RENDERING_KIND_SUPERVISED):
        session.hint(f"jobs plan --model {short(done.model)} --rendering {short(done.name)}")


def _finished(session: Session, name: str) -> Rendering:
    """Return the rendering once it is READY; show the first refused records when it fails."""
    from luthier.client.cli.following import follow
    from luthier.client.cli.views import error_table
    from luthier.client.failures import RenderingFailed

    try:
        stop = f"renderings cancel {short(name)}"
        return follow(session, name, session.client.renderings.wait, stop=stop)
    except RenderingFailed:
        errors = list(islice(session.client.renderings.errors(name), _SHOWN_ERRORS + 1))
        if errors and not session.for_programs:
            session.err.print(error_table(errors[:_SHOWN_ERRORS]))
            if len(errors) > _SHOWN_ERRORS:
                session.note(f"... and more: luthier renderings errors {short(name)}")
        raise


@renderings.command("list")
@deleted_option
@pass_session
def list_renderings(session: Session, deleted: bool) -> None:
    """List the renderings, newest first."""
    session.show_list(session.client.renderings.list(show_deleted=deleted), _table)


@renderings.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show a rendering with its token statistics."""
    session.show(session.client.renderings.get(name), _facts)


@renderings.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask a rendering that is being made to stop."""
    session.show(session.client.renderings.cancel(name), _facts)


add_deleting(
    renderings, lambda session, _: session.client.renderings, "Delete a rendering that no running job reads."
)


@renderings.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def errors(session: Session, name: str) -> None:
    """List the records that could not be rendered: file and line, reason."""
    from luthier.client.cli.views import error_table

    session.show_list(session.client.renderings.errors(name), error_table)


@renderings.command()
@click.argument("name", shell_complete=complete_names)
@click.option("--split", type=click.Choice(["train", "validation", "test"]), help="Only rows of this split.")
@click.option("--unsupervised", is_flag=True, help="Only rows that teach nothing.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=3, show_default=True, help="Rows, or pairs, to show."
)
@pass_session
def preview(session: Session, name: str, split: str | None, unsupervised: bool, limit: int) -> None:
    """Show rows token by token: green is learnt, dim is context, special tokens stand out.

    What the rows of a pair begin with alike is shown with the first of them.
    """
    from luthier.v1.dataset_pb2 import SPLIT_UNSPECIFIED, Split

    wanted = Split.Value(f"SPLIT_{split.upper()}") if split else SPLIT_UNSPECIFIED
    found = session.client.renderings.preview(
        name, split=wanted, unsupervised_only=unsupervised, page_size=min(limit, 100)
    )
    rows = _units(found, limit)
    if session.for_programs:
        session.show_list(rows, lambda _: _table([]))
        return
    is_empty = True
    for row in rows:
        is_empty = False
        session.out.print(_row_head(row))
        session.out.print(row_text(row))
        session.out.print()
    if is_empty:
        session.note("nothing found")


def _units(rows: Iterable[RenderedRow], limit: int) -> Iterator[RenderedRow]:
    """Yield the rows of the first units."""
    units = groupby(rows, key=lambda row: row.unit if row.role else row.row)
    for _, unit in islice(units, limit):
        yield from unit


def row_text(row: RenderedRow) -> Text:
    """Return the tokens of a row.

    Learnt ones green, others dim, special ones inverse; white space is kept.
    """
    from rich.text import Text

    text = Text()
    for token in row.tokens:
        is_special = len(token.text) > 2 and token.text[0] == "<" and token.text[-1] == ">"
        style = "green" if token.supervised else "dim"
        if is_special:
            style += " reverse"
        shown = token.text if token.text.strip("\n") or is_special else token.text.replace("\n", "\u23ce\n")
        text.append(shown, style)
    return text


def _row_head(row: RenderedRow) -> Text:
    from rich.text import Text

    from luthier.client.cli.views import split_name

    learnt = sum(token.supervised for token in row.tokens)
    counts = f"{row.num_shared_tokens + len(row.tokens)} tokens, {learnt} learnt"
    shared = f", the first {row.num_shared_tokens} as in row {row.unit}" if row.num_shared_tokens else ""
    named = f"row {row.row}  {row.role}" if row.role else f"row {row.row}"
    return Text(f"{named}  {split_name(row.split)}  {row.filename}:{row.line}  {counts}{shared}", "bold")


def _table(renderings: Iterable[Rendering]) -> Table:
    from luthier.client.cli.views import number, state, table, when

    made = table("NAME", "STATE", "VERSION", "MODEL", "#ROWS", "CREATED (UTC)")
    for rendering in renderings:
        count = sum(entry.tokens.count for entry in rendering.split_statistics)
        made.add_row(
            short(rendering.name),
            state(rendering),
            short(rendering.dataset_version),
            short(rendering.model),
            number(count),
            when(rendering.create_time),
        )
    return made


def _facts(rendering: Rendering) -> Group:
    from rich.console import Group
    from rich.text import Text

    from luthier.client.cli.views import facts, failure, number, state, waiting
    from luthier.v1.rendering_pb2 import RenderingKind

    head = facts(
        [
            ("rendering", short(rendering.name)),
            ("state", state(rendering)),
            ("failure", failure(rendering)),
            ("waiting", waiting(rendering)),
            ("version", short(rendering.dataset_version)),
            ("model", short(rendering.model)),
            (
                "kind",
                RenderingKind.Name(rendering.kind).removeprefix(_KIND).lower() if rendering.kind else "",
            ),
            ("today is", rendering.template_date),
            ("rows", "one for each answer" if rendering.split_turns else ""),
            ("digest", rendering.digest),
            ("cannot be rendered", number(rendering.num_errors) if rendering.num_errors else ""),
        ]
    )
    tables = [made for made in (_splits(rendering), _roles(rendering)) if made.row_count]
    shown = [part for made in tables for part in (Text(""), made)]
    warnings = [Text(f"warning: {warning}", "yellow") for warning in rendering.warnings]
    named = [Text(line, "yellow") for line in _named_records(rendering)]
    return Group(head, *shown, *warnings, *named)


def _splits(rendering: Rendering) -> Table:
    from luthier.client.cli.views import number, split_name, table

    made = table(
        "SPLIT",
        "#RECORDS",
        "#ROWS",
        "#TOKENS",
        "#P50",
        "#P95",
        "#MAX",
        "#LEARNT",
        "#DROPPED",
        "#TRUNCATED",
        "#REFUSED",
        "#NOTHING TO LEARN",
    )
    for entry in rendering.split_statistics:
        tokens = entry.tokens
        lengths = (tokens.count, tokens.sum, tokens.p50, tokens.p95, tokens.maximum)
        left_out = (entry.num_dropped, entry.num_truncated, entry.num_refused, entry.num_unsupervised)
        counts = (entry.num_records, *lengths, entry.supervised_tokens.sum, *left_out)
        made.add_row(split_name(entry.split), *(number(count) for count in counts))
    return made


def _roles(rendering: Rendering) -> Table:
    from luthier.client.cli.views import number, split_name, table

    made = table("SPLIT", "ROLE", "#ROWS", "#TOKENS", "#P50", "#P95", "#MAX", "#LEARNT", "#TRUNCATED")
    for entry in rendering.split_statistics:
        for role in entry.roles:
            tokens = role.tokens
            lengths = (tokens.count, tokens.sum, tokens.p50, tokens.p95, tokens.maximum)
            counts = (*lengths, role.supervised_tokens.sum, role.num_truncated)
            made.add_row(split_name(entry.split), role.role, *(number(count) for count in counts))
    return made


def _named_records(rendering: Rendering) -> Iterator[str]:
    """Yield the first records that teach nothing, and of each finding those behind the one that its warning names."""
    from luthier.v1.rendering_pb2 import RenderingFinding

    for unsupervised in rendering.unsupervised_records[:_SHOWN_RECORDS]:
        yield f"nothing to learn: {unsupervised.filename}:{unsupervised.line}: {unsupervised.message}"
    for finding in rendering.findings:
        kind = RenderingFinding.Kind.Name(finding.kind).removeprefix("KIND_").replace("_", " ").lower()
        for record in finding.records[1:_SHOWN_RECORDS]:
            yield f"{kind}: {record.filename}:{record.line}: {record.message}"
