"""`luthier doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from luthier.client.cli.session import Session, pass_session
from luthier.client.escaping import escaped_line

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@pass_session
def doctor(session: Session) -> None:
    """Look at what leads to the services: configuration, key, addresses, versions, clocks. Changes nothing.

    Exit code 1: there is a problem, and its line says what would be right.
    """
    from luthier.client.cli.forms import plain
    from luthier.client.config import environment
    from luthier.client.doctor import examined

    if session.form == "name":
        raise click.UsageError("-o name is for what has a name: what a doctor finds has none")
    found = []
    for one in examined(session.arguments, environment()):
        found.append(one)
        if not session.for_programs:
            level = click.style(f"{one.level:<8}", fg=_COLOURS[one.level])
            click.echo(f"{level} {one.what:<18} {escaped_line(one.text)}")
    if session.for_programs:
        click.echo(plain([asdict(one) for one in found], session.form))
    if any(one.level == "problem" for one in found):
        raise click.exceptions.Exit(1)
