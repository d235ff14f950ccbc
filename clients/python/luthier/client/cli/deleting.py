"""What every `delete` command takes, and asks, before anything is deleted; and the way back: `undelete` and `purge`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session

if TYPE_CHECKING:
    from google.protobuf.message import Message

Delete = Callable[..., None]
Find = Callable[[Session, str], "Deletable"]


def pass_deletion(function: Delete) -> Callable[..., None]:
    """Give a command the session, the NAME and the etag of what to delete, once whoever is at the terminal said yes."""

    @click.argument("name", shell_complete=complete_names)
    @click.option(
        "--etag", default="", help="Delete it only if it still has this etag; `show --json` prints it."
    )
    @click.option("--yes", "-y", is_flag=True, help="Do not ask. Where no terminal is, nothing is asked.")
    @pass_session
    @wraps(function)
    def asked(session: Session, name: str, etag: str, yes: bool, **options: bool) -> None:
        if not yes:
            session.confirm(f"delete {name} for good?" if any(options.values()) else f"delete {name}?")
        function(session, name, _quoted(etag), **options)

    return asked


def _quoted(etag: str) -> str:
    """Return an etag with the quotes that belong to it: a shell takes them away."""
    return etag if not etag or etag.startswith('"') else f'"{etag}"'


class Deletable(Protocol):
    """The resources of one kind, as a client has them."""

    def delete(self, name: str, *, etag: str = "") -> Any:
        """Delete one."""
        ...

    def undelete(self, name: str, *, uid: str = "") -> Message:
        """Bring one back."""
        ...

    def purge(self, name: str, *, uid: str = "") -> Message:
        """Give one up for good."""
        ...


def add_deleting(group: click.Group, found: Find, doc: str) -> None:
    """Give a group the commands `delete`, `undelete` and `purge`; `found` returns the resources that a name is one of.

    `doc` says what the first does.
    """

    @group.command(help=doc)
    @click.option(
        "--now", is_flag=True, help="Purge it too, in place of keeping it until its purge time: no way back."
    )
    @pass_deletion
    def delete(session: Session, name: str, etag: str, now: bool) -> None:
        kind = found(session, name)
        deleted = kind.delete(name, etag=etag)
        if now:
            session.show_changed(kind.purge(name, uid=deleted.uid), "is purged")
        else:
            session.show_deleted(deleted)

    uid_option = click.option(
        "--uid",
        default="",
        help="Which of several that had the name. [default: the one that was deleted last]",
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
        """Purge what was deleted now, in place of at its purge time. There is no way back."""
        if not yes:
            session.confirm(f"purge {name} for good?")
        session.show_changed(found(session, name).purge(name, uid=uid), "is purged")


def deleted_option(function: Callable[..., None]) -> Callable[..., None]:
    """Give a `list` command the flag that lists what is deleted too."""
    option = click.option("--deleted", is_flag=True, help="Also what is deleted and can be brought back.")
    return option(function)
