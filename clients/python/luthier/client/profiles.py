"""Profiles: what a client is told of one installation of the services, by name, in a file of its user.

default_profile = "laptop"

[profiles.laptop]
home = "~/.local/share/luthier"

[profiles.team]
project = "support"
data_address = "https://luthier.example.com:7601"
api_key_file = "~/.config/luthier/team.key"
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

from luthier.errors import InvalidArgument, NotFound

CONFIG_VARIABLE = "LUTHIER_CLIENT_CONFIG"
PROFILE_VARIABLE = "LUTHIER_CLIENT_PROFILE"
_KEY_WORDS = ("api_key", "key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one profile says; None: nothing. Addresses as in `ClientConfig`; files and folders may begin with ~."""

    project: str | None = None
    home: str | None = None
    data_address: str | None = None
    training_address: str | None = None
    evaluation_address: str | None = None
    api_key_file: str | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """The profiles of a file, and the one that is taken where nobody names one; empty: none."""

    path: Path
    by_name: Mapping[str, Profile] = field(default_factory=dict)
    default: str = ""

    def named(self, name: str) -> Profile:
        """Return a profile. Raises NotFound that names those there are."""
        if name in self.by_name:
            return self.by_name[name]
        known = ", ".join(sorted(self.by_name)) or "none"
        raise NotFound(f"no profile {name!r} in {self.path}; there are: {known}")


def config_path(environ: Mapping[str, str]) -> Path:
    """Return where profiles are: what LUTHIER_CLIENT_CONFIG names, or luthier/config.toml of XDG_CONFIG_HOME."""
    if named := environ.get(CONFIG_VARIABLE):
        return Path(named).expanduser()
    return Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "luthier" / "config.toml"


def read_profiles(environ: Mapping[str, str]) -> Profiles:
    """Return the profiles of the user's file; none where there is no file, unless LUTHIER_CLIENT_CONFIG names it.

    Raises:
        InvalidArgument: the file cannot be read, is no TOML, or says something that no profile has.
    """
    path = config_path(environ)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if environ.get(CONFIG_VARIABLE):
            raise InvalidArgument(f"{CONFIG_VARIABLE} must name a file, there is no {path}") from None
        return Profiles(path=path)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} must be a readable file of TOML: {error}") from error
    _require_known(document, ("default_profile", "profiles"), f"{path}")
    tables = document.get("profiles", {})
    if not isinstance(tables, dict):
        raise InvalidArgument(f"{path}: profiles must be tables, [profiles.NAME]")
    by_name = {name: _profile(table, f"{path}: profiles.{name}") for name, table in tables.items()}
    default = document.get("default_profile", "")
    if default and default not in by_name:
        raise InvalidArgument(f"{path}: default_profile must be one of {sorted(by_name)}, got {default!r}")
    return Profiles(path=path, by_name=MappingProxyType(by_name), default=default)


def _profile(table: object, where: str) -> Profile:
    if not isinstance(table, dict):
        raise InvalidArgument(f"{where} must be a table")
    if found := next((word for word in _KEY_WORDS if word in table), None):
        raise InvalidArgument(
            f"{where}: {found} does not belong here; name a file that holds the key: api_key_file"
        )
    _require_known(table, [one.name for one in fields(Profile)], where)
    for name, value in table.items():
        kinds: tuple[type, ...] = (int, float) if name == "timeout_seconds" else (str,)
        if not isinstance(value, kinds) or isinstance(value, bool) or value == "":
            right = "a number" if name == "timeout_seconds" else "a text"
            raise InvalidArgument(f"{where}.{name} must be {right}, got {value!r}")
    return Profile(**table)


def _require_known(table: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InvalidArgument(f"{where}: {name} is not known: {hint}")
