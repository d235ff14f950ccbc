"""The root of the command line: global options, and errors turned into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import click

from luthier.client.cli.completing import complete_profiles
from luthier.client.cli.forms import output_options
from luthier.client.cli.groups import ENDED, LazyGroup
from luthier.client.cli.hints import hint_of
from luthier.client.cli.session import Session, choose_form
from luthier.client.config import silence_grpc
from luthier.client.escaping import escaped, escaped_line
from luthier.errors import (
    LuthierError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

_COMMANDS = "luthier.client.cli"
_EPILOG = (
    "Exit codes: 0 done, 1 error, 2 wrong usage, 3 not found, 4 credentials, 5 unavailable or over a limit,"
    " 6 the resource failed, 130 interrupted."
)
EXIT_ERROR, EXIT_NOT_FOUND, EXIT_CREDENTIALS, EXIT_UNAVAILABLE, EXIT_FAILED, EXIT_INTERRUPTED = (
    1,
    3,
    4,
    5,
    6,
    130,
)


class _Root(LazyGroup):
    members: ClassVar[Mapping[str, tuple[str, str]]] = {
        "datasets": (
            f"{_COMMANDS}.datasets:datasets",
            "Upload examples, check and split them, look at the records.",
        ),
        "renderings": (
            f"{_COMMANDS}.renderings:renderings",
            "Turn a version into tokens and loss masks; preview them.",
        ),
        "models": (f"{_COMMANDS}.models:models", "Register base models; list and download models."),
        "jobs": (f"{_COMMANDS}.jobs:jobs", "Plan, start, watch and cancel fine-tuning jobs."),
        "evaluations": (
            f"{_COMMANDS}.evaluations:evaluations",
            "Compare models on held-out records; write a report.",
        ),
        "aliases": (
            f"{_COMMANDS}.aliases:aliases",
            "Name models by their role, e.g. production; guard each move by gates.",
        ),
        "generate": (f"{_COMMANDS}.generate:generate", "Let a model answer, word by word; --chat goes on."),
        "profiles": (f"{_COMMANDS}.profiles:profiles", "Show the profiles of the configuration file."),
        "doctor": (
            f"{_COMMANDS}.doctor:doctor",
            "Look at what leads to the services: key, addresses, clocks.",
        ),
        "completion": (f"{_COMMANDS}.completion:completion", "Have the shell complete commands and names."),
    }

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit with its code; without `standalone_mode` return the code."""
        code = self._run(args, prog_name or "luthier", complete_var, extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and show the error that ends it."""
        try:
            return super().invoke(ctx)
        except LuthierError as error:
            show_error(error, ctx.meta.get(ENDED))
            raise click.exceptions.Exit(exit_code(error)) from error

    def _run(
        self, args: Sequence[str] | None, prog_name: str, complete_var: str | None, extra: Mapping[str, Any]
    ) -> int:
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            return EXIT_INTERRUPTED
        except LuthierError as error:
            show_error(error)
            return exit_code(error)
        except BrokenPipeError:
            # The reader of our stdout went away, e.g. `| head`. Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {escaped(str(error))}", err=True)
            return EXIT_ERROR
        return result if isinstance(result, int) else 0


def exit_code(error: LuthierError) -> int:
    """Return the documented exit code of an error."""
    from luthier.client.failures import ResourceFailed

    if isinstance(error, ResourceFailed):
        return EXIT_FAILED
    if isinstance(error, NotFound):
        return EXIT_NOT_FOUND
    if isinstance(error, Unauthenticated | PermissionDenied):
        return EXIT_CREDENTIALS
    if isinstance(error, Unavailable | ResourceExhausted):
        return EXIT_UNAVAILABLE
    return EXIT_ERROR


def show_error(error: LuthierError, command: click.Command | None = None) -> None:
    """Write an error to stderr: message and reason in one line, then fields, request id and what to do.

    `command` is the one that it ended; None: it came before any began.
    """
    label = click.style("error:", fg="red", bold=True)
    reason = click.style(f"[{escaped_line(error.reason)}]", dim=True)
    click.echo(f"{label} {escaped(error.message)} {reason}", err=True)
    if len(error.violations) > 1 or any(v.description not in error.message for v in error.violations):
        for violation in error.violations:
            field = click.style(escaped_line(violation.field), bold=True)
            click.echo(f"  {field}: {escaped(violation.description)}", err=True)
    if "request_id" in error.metadata:
        click.secho(f"  request id {escaped_line(error.metadata['request_id'])}", err=True, dim=True)
    if (hint := hint_of(error, command)) is not None:
        click.echo(f"hint: {hint}", err=True)


@click.group(
    cls=_Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models as a service.",
    epilog=_EPILOG,
)
@output_options(choose_form)
@click.option(
    "--profile",
    metavar="NAME",
    shell_complete=complete_profiles,
    help="Profile of the configuration file: its project, home and addresses.",
)
@click.option("--project", metavar="ID", help="Project that short names belong to. [default: default]")
@click.option(
    "--home", type=click.Path(file_okay=False), help="Home of the services, where the API key lies."
)
@click.option(
    "--data-address", metavar="ADDRESS", help="Where the data service is. [default: 127.0.0.1:7601]"
)
@click.option("--training-address", metavar="ADDRESS", help="The training service. [default: 127.0.0.1:7602]")
@click.option(
    "--evaluation-address", metavar="ADDRESS", help="The evaluation service. [default: 127.0.0.1:7603]"
)
@click.version_option(package_name="luthier-client", prog_name="luthier")
@click.pass_context
def main(ctx: click.Context, /, **options: str | None) -> None:
    """Keep the global options for the command that follows."""
    silence_grpc()
    session = ctx.ensure_object(Session)
    session.options = options
    ctx.call_on_close(session.close)
