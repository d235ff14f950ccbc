"""What every `delete` command takes, and asks, before anything is deleted; and the way back: `undelete` and `purge`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Protocol

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session

if TYPE_CHECKING:
    from google.protobuf.message import Message

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


class Deletable(Protocol):
    """The resources of one kind, as a client has them."""

    def undelete(self, name: str, *, uid: str = "") -> Message:
        """Bring one back."""
        ...

    def purge(self, name: str, *, uid: str = "") -> Message:
        """Give one up for good."""
        ...


def add_undeleting(group: click.Group, found: Callable[[Session, str], Deletable]) -> None:
    """Give a group the commands `undelete` and `purge`; `found` returns the resources that a name is one of."""
    uid_option = click.option(
        "--uid", default="", help="Which of several that had the name. [default: the one that was deleted last]"
    )

    @group.command()
    @click.argument("name")
    @uid_option
    @pass_session
    def undelete(session: Session, name: str, uid: str) -> None:
        """Bring back what was deleted; `list --deleted` shows it, and until when."""
        session.show_changed(found(session, name).undelete(name, uid=uid), "is back")

    @group.command()
    @click.argument("name")
    @uid_option
    @click.option("--yes", "-y", is_flag=True, help="Do not ask. Where no terminal is, nothing is asked.")
    @pass_session
    def purge(session: Session, name: str, uid: str, yes: bool) -> None:
        """Purge what was deleted now, in place of 30 days after its deletion. There is no way back."""
        if not yes:
            session.confirm(f"purge {name} for good?")
        session.show_changed(found(session, name).purge(name, uid=uid), "is purged")


def deleted_option(function: Callable[..., None]) -> Callable[..., None]:
    """Give a `list` command the flag that lists what is deleted too."""
    option = click.option("--deleted", is_flag=True, help="Also what is deleted and can be brought back.")
    return option(function)
