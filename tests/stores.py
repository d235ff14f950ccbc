"""The stores that tests run on, opened from URLs as services open theirs: another adapter is tested by other URLs.

`--database-url` and `--blobs-url` are templates: `{path}` is where a test would have the store, below its own folder;
`{name}`, of letters and digits, is as much its own, for what is no file: `...?schema={name}`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from luthier.errors import InvalidArgument
from luthier.storage import opening
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.dialect import file_of
from luthier.storage.opening import StoreUrls
from luthier.storage.staging import Staging

SERVICES = ("data", "training", "evaluation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Templates:
    """Of the URLs of all stores of a run."""

    database: str = "sqlite+aiosqlite:///{path}.db"
    blobs: str = "file://{path}"


class Chosen:
    """The templates of this run; those that services have by themselves unless `use` is called."""

    templates = Templates()


def use(database: str, blobs: str) -> None:
    """Have all stores at other URLs from now on; empty: as they are.

    Raises InvalidArgument for a template without a place of a test's own, and for a URL that no adapter has, with those
    that are known.
    """
    known = Templates()
    made = Templates(database=database or known.database, blobs=blobs or known.blobs)
    for option, template in (("--database-url", made.database), ("--blobs-url", made.blobs)):
        if "{path}" not in template and "{name}" not in template:
            raise InvalidArgument(f"{option} must have {{path}} or {{name}} in it, got {template!r}")
    example = Path("/tmp/example")
    staging = example / "staging"
    opening.check_urls(
        StoreUrls(
            database=_filled(made.database, str(example)),
            blobs=_filled(made.blobs, str(example)),
            staging=staging,
        )
    )
    Chosen.templates = made


def database_url(path: Path) -> str:
    """Return the URL of the database that a test would have at a path (without `.db`)."""
    return _filled(Chosen.templates.database, quote(str(path.absolute())))


def blobs_url(path: Path) -> str:
    """Return the URL of the store of blobs that a test would have at a path."""
    return _filled(Chosen.templates.blobs, quote(str(path.absolute())))


def _filled(template: str, path: str) -> str:
    name = f"t{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    return template.replace("{path}", path).replace("{name}", name)


def open_database(path: Path, *, min_free_bytes: int = 0) -> Database:
    """Open the database that a test would have at a path (without `.db`)."""
    return opening.open_database(database_url(path), min_free_bytes)


def open_blobs(path: Path, *, min_free_bytes: int = 0) -> BlobStore:
    """Open the store of blobs that a test would have at a path."""
    return opening.open_blobs(blobs_url(path), min_free_bytes)


def open_staging(path: Path, blobs: BlobStore) -> Staging:
    """Open a place of uploads in progress, a folder of this machine whatever the store is."""
    return opening.open_staging(path, blobs)


def service_urls(home: Path, service: str) -> dict[str, Any]:
    """Return where a service of a home has its stores, as its configuration says it."""
    folder = home / service
    return {"database_url": database_url(folder / service), "blobs_url": blobs_url(folder / "blobs")}


def service_database(home: Path, service: str) -> Database:
    """Open the database of a service of a home, beside it."""
    return open_database(home / service / service)


def database_file(path: Path) -> Path:
    """Return the file of the database that a test would have at a path, of an adapter that has it in one."""
    return file_of(database_url(path))


def service_file(home: Path, service: str) -> Path:
    """Return the file of the database of a service of a home."""
    return database_file(home / service / service)


def service_blobs(home: Path, service: str) -> BlobStore:
    """Open the blobs of a service of a home, beside it."""
    return open_blobs(home / service / "blobs")


def environment(home: Path) -> dict[str, str]:
    """Return where all services of a home have their stores, as their environment says it."""
    return {
        f"LUTHIER_{service.upper()}_{name.upper()}": url
        for service in SERVICES
        for name, url in service_urls(home, service).items()
    }
