"""Waiting for a resource while its events are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from luthier.client.cli.live import events
from luthier.client.cli.session import Session
from luthier.v1.event_pb2 import Event

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Waiting(Protocol[R_co]):
    """The `wait` method of a group of resources."""

    def __call__(
        self,
        name: str,
        *,
        timeout_seconds: float | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> R_co:
        """Return the resource once it is done."""
        ...


def follow(session: Session, name: str, wait: Waiting[R], *, stop: str) -> R:
    """Show events on stderr until the resource is done; with --json nothing is shown. Raises as `wait`.

    `stop`: the command that ends it.
    """
    try:
        if session.for_programs:
            return wait(name)
        with events(session, name) as show:
            return wait(name, on_event=show)
    except KeyboardInterrupt:
        session.note(f"stopped waiting; it goes on until: luthier {stop}")
        raise


def watch(session: Session, name: str, wait: Waiting[R], *, stop: str, chart: bool = False) -> R:
    """Show events until the resource is done.

    With --json each is a line on stdout. `stop`: the command that ends it. `chart`: with a curve, on a terminal.
    """
    try:
        with events(session, name, chart) as show:
            return wait(name, on_event=show)
    except KeyboardInterrupt:
        session.note(f"stopped watching; it goes on until: luthier {stop}")
        raise
