"""API keys of some projects and roles, in a file of the home that the operator keeps: `api-keys.toml`.

    [reporting]
    sha256 = "5f3c..."         # of the key; the key itself stands nowhere
    projects = ["default"]     # ["*"]: all that are served
    roles = ["reader"]

The key in the file `api-key` has every project and role. Services read both when they start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from luthier.runtime.field_limits import Limit
from luthier.runtime.home import require_own
from luthier.runtime.keys import read_private
from luthier.runtime.names import ID_LIMIT

GRANTED_FILE = "api-keys.toml"
ALL_PROJECTS = "*"

KeyRole = Literal["reader", "generator", "writer"]
KEY_ROLES: frozenset[KeyRole] = frozenset({"reader", "generator", "writer"})
"""Roles of API keys: to read; to have models answer and answers graded; to create, change and delete."""

_FIELDS = ("sha256", "projects", "roles")
_ROLE_LIMIT = Limit(rule=f"must be among {', '.join(sorted(KEY_ROLES))}", allows=KEY_ROLES.__contains__)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedKey:
    """What a key may do. `projects` are ids of projects, or `ALL_PROJECTS` alone; `digest` is the key's sha256."""

    name: str
    digest: bytes
    projects: frozenset[str]
    roles: frozenset[KeyRole]


def read_granted(home: Path) -> tuple[GrantedKey, ...]:
    """Return the keys of a home's file; none where there is no file.

    Raises InvalidArgument that names every entry that is wrong, FailedPrecondition when others may read the file or
    this process may not.
    """
    path = home / GRANTED_FILE
    return _parsed(_text(path), path)


def grant_key(home: Path, name: str, projects: Collection[str], roles: Collection[str]) -> str:
    """Add a new key to a home's file, and return it: it is stored nowhere.

    Raises AlreadyExists for a name that has a key, InvalidArgument for what cannot be granted, FailedPrecondition for
    a home that is not there or another user's, whose services could not read the file, and what `read_granted` raises.
    """
    _require_home(home)
    with _alone(home) as folder:
        return _grant(home / GRANTED_FILE, name, projects, roles, folder)


def _grant(path: Path, name: str, projects: Collection[str], roles: Collection[str], folder: int) -> str:
    before = _text(path)
    if any(name == known.name for known in _parsed(before, path)):
        raise AlreadyExists(f"{path} has a key {name} already; take another name, or delete that entry first")
    key = f"lk_{secrets.token_urlsafe(32)}"
    entry = {
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "projects": sorted(projects),
        "roles": sorted(roles),
    }
    _require_valid({name: entry}, "a new key")
    lines = [f"[{name}]", *(f"{field} = {_toml(value)}" for field, value in entry.items())]
    _replace(path, (f"{before.rstrip()}\n\n" if before.strip() else "") + "\n".join(lines) + "\n")
    os.fsync(folder)
    return key


def _text(path: Path) -> str:
    try:
        return read_private(path)
    except NotFound:
        return ""


def _require_home(home: Path) -> None:
    try:
        owner = home.stat().st_uid
    except OSError as error:
        raise FailedPrecondition(
            f"there must be a home of services at {home}, whose LUTHIER_HOME it is: {error.strerror}; start them first",
            metadata={"home": str(home)},
        ) from error
    if owner != os.geteuid():
        raise FailedPrecondition(
            f"{home} belongs to user {owner}, and services could not read what user {os.geteuid()} writes there; "
            f"run it as the user of the services: sudo -u '#{owner}' env LUTHIER_HOME={home} luthierd grant-key ...",
            metadata={"home": str(home)},
        )
    require_own(home)


@contextmanager
def _alone(home: Path) -> Iterator[int]:
    """Have no other process add a key for the length of a block; yields the folder's descriptor."""
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(folder)


def _parsed(text: str, path: Path) -> tuple[GrantedKey, ...]:
    try:
        entries = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{path} must be TOML: {error}") from error
    _require_valid(entries, str(path))
    return tuple(
        GrantedKey(
            name=name,
            digest=bytes.fromhex(entry["sha256"]),
            projects=frozenset(entry["projects"]),
            roles=frozenset(entry["roles"]),
        )
        for name, entry in entries.items()
    )


def _require_valid(entries: Mapping[str, Any], where: str) -> None:
    wrong = [problem for name, entry in entries.items() for problem in _problems(name, entry)]
    digests = [entry["sha256"] for entry in entries.values()] if not wrong else []
    wrong += sorted({f"sha256 {one} stands twice" for one in digests if digests.count(one) > 1})
    if wrong:
        raise InvalidArgument(f"{where}: {'; '.join(wrong)}")


def _problems(name: str, entry: Any) -> Iterator[str]:
    if not ID_LIMIT.allows(name):
        yield f"the name of a key {ID_LIMIT.rule}, got {name!r}"
    if not isinstance(entry, dict) or sorted(entry) != sorted(_FIELDS):
        yield f"{name} must be a table of {', '.join(_FIELDS)}, got {entry!r}"
        return
    digest = entry["sha256"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        yield f"{name}.sha256 must be the key's sha256 in 64 hex digits, got {digest!r}"
    yield from _wrong_values(f"{name}.roles", entry["roles"], _ROLE_LIMIT)
    if entry["projects"] != [ALL_PROJECTS]:
        yield from _wrong_values(f"{name}.projects", entry["projects"], ID_LIMIT)


def _wrong_values(field: str, values: Any, limit: Limit) -> Iterator[str]:
    if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
        yield f"{field} must be a list of one text or more, got {values!r}"
        return
    yield from (f"{field} {limit.rule}, got {one!r}" for one in values if not limit.allows(one))


def _toml(value: str | Sequence[str]) -> str:
    return f'"{value}"' if isinstance(value, str) else f"[{', '.join(map(_toml, value))}]"


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
