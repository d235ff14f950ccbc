"""What every `delete` command takes, and asks, before anything is deleted."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session

Delete = Callable[[Session, str, str], None]


def pass_deletion(function: Delete) -> Callable[..., None]:
    """Give a command the session, the NAME and the etag of what to delete, once whoever is at the terminal said yes."""

    @click.argument("name", shell_complete=complete_names)
    @click.option(
        "--etag", default="", help="Delete it only if it still has this etag; `show --json` prints it."
    )
    @click.option("--yes", "-y", is_flag=True, help="Do not ask. Where no terminal is, nothing is asked.")
    @pass_session
    @wraps(function)
    def asked(session: Session, name: str, etag: str, yes: bool) -> None:
        if not yes:
            session.confirm(f"delete {name}?")
        function(session, name, _quoted(etag))

    return asked


def _quoted(etag: str) -> str:
    """Return an etag with the quotes that belong to it: a shell takes them away."""
    return etag if not etag or etag.startswith('"') else f'"{etag}"'
