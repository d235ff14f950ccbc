"""What a command works with: the client, made when first used, and the way out for data and messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.cli.forms import FOR_PEOPLE, Form, entry, one, output_options, several
from luthier.client.escaping import escaped, escaped_line

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console
    from rich.table import Table

    from luthier.client import Client
    from luthier.client.config import ConfigArguments

R = TypeVar("R")
_PATIENCE_SECONDS = 10.0


class Session:
    """One run of the command line, which writes what it finds in a form."""

    def __init__(self, *, form: Form = "text") -> None:
        self.form: Form = form
        self.options: Mapping[str, str | None] = {}
        """The global options that were given, by name."""
        self._client: Client | None = None

    @property
    def is_wide(self) -> bool:
        """Whether details are shown that most people do not need."""
        return self.form == "wide"

    @property
    def for_programs(self) -> bool:
        """Whether what is written is read by a program: nothing but data, and nothing said beside it."""
        return self.form not in FOR_PEOPLE

    @property
    def client(self) -> Client:
        """The client for the given options. Raises as `read_config` does."""
        if self._client is None:
            from luthier.client import Client, read_config

            self._client = Client(read_config(self.arguments))
        return self._client

    @property
    def arguments(self) -> ConfigArguments:
        """What the given options say to a client."""
        from luthier.client import RetryPolicy
        from luthier.client.config import ConfigArguments

        options = self.options
        return ConfigArguments(
            profile=options.get("profile"),
            project=options.get("project"),
            home=options.get("home"),
            data_address=options.get("data_address"),
            training_address=options.get("training_address"),
            evaluation_address=options.get("evaluation_address"),
            # A person at a terminal wants to know soon that nothing answers.
            retry=RetryPolicy(deadline_seconds=_PATIENCE_SECONDS),
        )

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
        """Write one resource: in the form that programs want, or as `view` draws it."""
        if self.for_programs:
            click.echo(one(message, self.form))
        else:
            self.out.print(view(message))

    def show_deleted(self, message: Message) -> None:
        """Write that a resource is deleted, as `show_changed` does."""
        self.show_changed(message, "is deleted")

    def show_changed(self, message: Message, what: str) -> None:
        """Write what became of a resource: for programs the resource itself, or one line."""
        if self.for_programs:
            click.echo(one(message, self.form))
        else:
            click.echo(escaped(f"{message.name} {what}"))  # type: ignore[attr-defined]

    def show_list(self, messages: Iterable[Message], view: Callable[[Iterable[Any]], Table]) -> None:
        """Write resources: in the form that programs want, or as the table that `view` draws."""
        if self.for_programs:
            found = list(messages)
            if found or self.form != "name":
                click.echo(several(found, self.form))
            return
        table = view(messages)
        if table.row_count:
            self.out.print(table)
        else:
            self.note("nothing found")

    def show_line(self, message: Message) -> None:
        """Write one message of a stream for programs; nothing where they want names."""
        if self.form != "name":
            click.echo(entry(message, self.form))

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
        """Name the command that comes next; silent for programs."""
        if not self.for_programs:
            click.secho(f"next: luthier {escaped_line(command)}", err=True, dim=True)


def choose_form(ctx: click.Context, form: Form) -> None:
    """Have the session of a command write in a form from now on."""
    ctx.ensure_object(Session).form = form


def pass_session(function: Callable[..., R]) -> Callable[..., R]:
    """Give a command the session, and let --json and -o stand behind the command too."""
    return output_options(choose_form)(click.pass_obj(function))


def _console(*, stderr: bool) -> Console:
    from luthier.client.cli.console import EscapingConsole

    stream = sys.stderr if stderr else sys.stdout
    # Off a terminal rich assumes 80 columns and would cut tables that a program or a file can hold.
    width = None if stream.isatty() else 200
    return EscapingConsole(
        file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
    )
