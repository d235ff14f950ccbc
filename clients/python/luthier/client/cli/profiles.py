"""`luthier profiles`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from luthier.client.cli.session import Session, pass_session
from luthier.client.escaping import escaped

if TYPE_CHECKING:
    from luthier.client.profiles import Profile


@click.command()
@pass_session
def profiles(session: Session) -> None:
    """Show the profiles of the configuration file; the one that is taken by itself has a star."""
    from luthier.client.cli.forms import plain
    from luthier.client.cli.views import table
    from luthier.client.config import environment
    from luthier.client.profiles import PROFILE_VARIABLE, read_profiles

    found = read_profiles(environment())
    taken = environment().get(PROFILE_VARIABLE) or found.default
    if session.form == "name":
        click.echo("\n".join(escaped(name) for name in sorted(found.by_name)))
    elif session.for_programs:
        said = {name: _said(profile) for name, profile in sorted(found.by_name.items())}
        click.echo(plain({"path": str(found.path), "taken": taken, "profiles": said}, session.form))
    elif not found.by_name:
        session.note(f"there is no profile in {found.path}")
    else:
        shown = table("", "NAME", "PROJECT", "HOME", "ADDRESSES")
        for name, profile in sorted(found.by_name.items()):
            addresses = {
                one.removesuffix("_address"): value
                for one, value in _said(profile).items()
                if one.endswith("_address")
            }
            shown.add_row(
                "*" if name == taken else "",
                name,
                profile.project or "",
                profile.home or "",
                ", ".join(f"{one} {value}" for one, value in addresses.items()),
            )
        session.out.print(shown)


def _said(profile: Profile) -> dict[str, object]:
    return {name: value for name, value in asdict(profile).items() if value is not None}
