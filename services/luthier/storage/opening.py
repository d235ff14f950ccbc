"""Open what a service keeps its state in, by URLs: the one place where an adapter is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import FailedPrecondition
from luthier.storage.blobs import BlobReader, BlobStore
from luthier.storage.database import Database
from luthier.storage.dialect import check_url, file_of, url_of
from luthier.storage.local_blob_reader import LocalBlobReader
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging
from luthier.storage.local_urls import BLOBS
from luthier.storage.reading import DatabaseReader
from luthier.storage.staging import Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a service keeps its state in."""

    database: Database
    blobs: BlobStore
    staging: Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """The same, to be read: who has them can change nothing."""

    database: DatabaseReader
    blobs: BlobReader


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


def check_urls(urls: StoreUrls) -> None:
    """Raise InvalidArgument for a URL that nobody knows, with those that are."""
    check_url(urls.database)
    blob_folder(urls.blobs)


def open_stores(urls: StoreUrls, min_free_bytes: int) -> Stores:
    """Open the stores; their disks keep so many bytes free, for blobs a share of it.

    Raises InvalidArgument for a URL that nobody knows, with those that are; FailedPrecondition for a folder that
    cannot be made or written to.
    """
    check_urls(urls)
    database = open_database(urls.database, min_free_bytes)
    reserve_bytes = database.disk.reserve.min_free_bytes
    blobs = open_blobs(urls.blobs, reserve_bytes)
    staging = open_staging(urls.staging, blobs, reserve_bytes)
    return Stores(database=database, blobs=blobs, staging=staging)


def open_database(url: str, min_free_bytes: int = 0) -> Database:
    """Open the database of a URL. Raises as `open_stores` does."""
    check_url(url)
    with _writable(file_of(url).parent):
        return Database(url, min_free_bytes=min_free_bytes)


def open_blobs(url: str, min_free_bytes: int = 0) -> BlobStore:
    """Open the store of blobs of a URL. Raises as `open_stores` does."""
    folder = blob_folder(url)
    with _writable(folder):
        return LocalBlobStore(folder, min_free_bytes=min_free_bytes)


def open_staging(folder: Path, blobs: BlobStore, min_free_bytes: int = 0) -> Staging:
    """Open the place of uploads in progress, which become blobs of a store. Raises FailedPrecondition."""
    with _writable(folder):
        return LocalStaging(folder, blobs, min_free_bytes=min_free_bytes)


def open_readers(urls: StoreUrls) -> Readers:
    """Open the stores to be read: nothing is made or changed, and a service may run on them.

    Raises InvalidArgument for a URL that nobody knows; FailedPrecondition for a database that cannot be read so, and
    where there are no blobs.
    """
    check_urls(urls)
    folder = blob_folder(urls.blobs)
    if not folder.is_dir():
        raise FailedPrecondition(
            f"{folder} must be the folder of the service's blobs, there is none",
            metadata={"path": str(folder)},
        )
    return Readers(database=DatabaseReader(urls.database), blobs=LocalBlobReader(folder))


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(
            f"{folder} must be a folder that user {os.geteuid()} may write to: {error.strerror}",
            metadata={"path": str(folder)},
        ) from error


def folder_url(folder: Path) -> str:
    """Return the URL of the store of blobs that is a folder."""
    return BLOBS.of(folder)


def blob_folder(url: str) -> Path:
    """Return the folder that a store's URL names. Raises InvalidArgument for what is no such URL."""
    return BLOBS.path_of(url)
