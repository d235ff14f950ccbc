"""What a command works with: the client, made when first used, and the way out for data and messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.escaping import escaped, escaped_json, escaped_line

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console
    from rich.table import Table

    from luthier.client import Client

R = TypeVar("R")
_PATIENCE_SECONDS = 10.0


class Session:
    """One run of the command line; `is_wide`: with details that most people do not need."""

    def __init__(self, *, as_json: bool, options: Mapping[str, str | None]) -> None:
        self.as_json = as_json
        self.is_wide = False
        self._options = options
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client for the given options. Raises as `read_config` does."""
        if self._client is None:
            from luthier.client import Client, RetryPolicy, read_config
            from luthier.client.config import ConfigArguments

            # A person at a terminal wants to know soon that nothing answers.
            retry = RetryPolicy(deadline_seconds=_PATIENCE_SECONDS)
            options = self._options
            arguments = ConfigArguments(
                project=options["project"],
                home=options["home"],
                data_address=options["data_address"],
                training_address=options["training_address"],
                evaluation_address=options["evaluation_address"],
                retry=retry,
            )
            self._client = Client(read_config(arguments))
        return self._client

    @property
    def out(self) -> Console:
        """Console of stdout, for data."""
        return _console(stderr=False)

    @property
    def err(self) -> Console:
        """Console of stderr, for messages and progress."""
        return _console(stderr=True)

    def close(self) -> None:
        """Close the client, if there is one."""
        if self._client is not None:
            self._client.close()

    def show(self, message: Message, view: Callable[[Any], Any]) -> None:
        """Write one resource: as JSON, or as `view` draws it."""
        if self.as_json:
            click.echo(_as_json(_as_dict(message), indent=2))
        else:
            self.out.print(view(message))

    def show_deleted(self, message: Message) -> None:
        """Write that a resource is deleted: as JSON what it was, or one line."""
        if self.as_json:
            click.echo(_as_json(_as_dict(message), indent=2))
        else:
            click.echo(escaped(f"{message.name} is deleted"))  # type: ignore[attr-defined]

    def show_list(self, messages: Iterable[Message], view: Callable[[Iterable[Any]], Table]) -> None:
        """Write resources: as a JSON array, or as the table that `view` draws."""
        if self.as_json:
            click.echo(_as_json([_as_dict(message) for message in messages], indent=2))
            return
        table = view(messages)
        if table.row_count:
            self.out.print(table)
        else:
            self.note("nothing found")

    def show_line(self, message: Message) -> None:
        """Write one message of a stream as a line of JSON."""
        click.echo(_as_json(_as_dict(message)))

    def write(self, text: str) -> None:
        """Write a piece of text to stdout as it is, but for what would steer the terminal."""
        click.echo(escaped(text), nl=False)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something to the person, on stderr."""
        click.echo(escaped(text), err=True)

    def confirm(self, question: str) -> None:
        """Ask the person at the terminal, on stderr; where there is none, go on. Ends the command unless it is yes."""
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return
        if not click.confirm(escaped_line(question), err=True):
            self.note("nothing was deleted")
            raise click.exceptions.Exit(1)

    def hint(self, command: str) -> None:
        """Name the command that comes next; silent with --json."""
        if not self.as_json:
            click.secho(f"next: luthier {escaped_line(command)}", err=True, dim=True)


def pass_session(function: Callable[..., R]) -> Callable[..., R]:
    """Give a command the session, and let --json and -o stand behind the command too."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Session).as_json = True

    def choose(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        session = ctx.ensure_object(Session)
        session.as_json = session.as_json or value == "json"
        session.is_wide = value == "wide"

    json_option = click.option(
        "--json", is_flag=True, expose_value=False, callback=switch, help="Write proto JSON to stdout."
    )
    output = click.option(
        "-o",
        "shown_as",
        type=click.Choice(["wide", "json"]),
        expose_value=False,
        callback=choose,
        help="wide: with all details; json: as --json.",
    )
    return output(json_option(click.pass_obj(function)))


def _console(*, stderr: bool) -> Console:
    from luthier.client.cli.console import EscapingConsole

    stream = sys.stderr if stderr else sys.stdout
    # Off a terminal rich assumes 80 columns and would cut tables that a program or a file can hold.
    width = None if stream.isatty() else 200
    return EscapingConsole(
        file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
    )


def _as_json(values: Any, indent: int | None = None) -> str:
    return escaped_json(json.dumps(values, indent=indent, ensure_ascii=False))


def _as_dict(message: Message) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)
