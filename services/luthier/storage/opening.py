"""Open what a service keeps its state in, by URLs: the one place where an adapter is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from luthier.errors import InvalidArgument
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.dialect import url_of
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging
from luthier.storage.staging import Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a service keeps its state in."""

    database: Database
    blobs: BlobStore
    staging: Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUrls:
    """Where the stores are.

    Attributes:
        database: `sqlite+aiosqlite:////path/of/a/file`.
        blobs: `file:///path/of/a/folder`.
        staging: a folder of this machine.
    """

    database: str
    blobs: str
    staging: Path


def store_urls(folder: Path, database_url: str = "", blobs_url: str = "") -> StoreUrls:
    """Return where a service keeps its state: below its folder, called as it is, unless URLs say otherwise."""
    return StoreUrls(
        database=database_url or url_of(folder / f"{folder.name}.db"),
        blobs=blobs_url or folder_url(folder / "blobs"),
        staging=folder / "blobs" / "staging",
    )


def open_stores(urls: StoreUrls, min_free_bytes: int) -> Stores:
    """Open the stores; their disks keep so many bytes free, for blobs a share of it.

    Raises InvalidArgument for a URL that nobody knows, with those that are.
    """
    folder = blob_folder(urls.blobs)
    database = Database(urls.database, min_free_bytes=min_free_bytes)
    reserve_bytes = database.disk.reserve.min_free_bytes
    blobs = LocalBlobStore(folder, min_free_bytes=reserve_bytes)
    staging = LocalStaging(urls.staging, blobs, min_free_bytes=reserve_bytes)
    return Stores(database=database, blobs=blobs, staging=staging)


def folder_url(folder: Path) -> str:
    """Return the URL of the store of blobs that is a folder."""
    return f"file://{quote(str(folder.absolute()))}"


def blob_folder(url: str) -> Path:
    """Return the folder that a store's URL names. Raises InvalidArgument for what is no such URL."""
    parts = urlsplit(url)
    if (
        parts.scheme != "file"
        or parts.netloc
        or parts.query
        or parts.fragment
        or not parts.path.startswith("/")
    ):
        raise InvalidArgument(
            f"blob store URL must be file:///path/of/a/folder, got {url!r}; other stores are not supported"
        )
    return Path(unquote(parts.path))
