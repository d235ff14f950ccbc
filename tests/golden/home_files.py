"""A home as files that git keeps: each database as SQL text, the rest of the folder as one small archive.

<folder>/data.sql, training.sql, evaluation.sql   what `sqlite3` dumps; `{home}` stands for the home's own path
<folder>/files.tar.xz                             keys, blobs, staged bytes, folders of models
<folder>/answers.jsonl.xz                         what the code that made the home answered, see `answers`
"""

from __future__ import annotations

import io
import lzma
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

SERVICES = ("data", "training", "evaluation")
ARCHIVE = "files.tar.xz"
_KEYS = ("api-key", "worker-key", "token-secret")
_HOME = "{home}"
_HOUR_US = 3_600_000_000


def pack_home(home: Path, folder: Path) -> None:
    """Write a home that no process works on into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for service in SERVICES:
        with closing(sqlite3.connect(_database(home, service))) as connection:
            lines = "".join(f"{line}\n" for line in connection.iterdump())
        assert _HOME not in lines, f"{service} holds the text {_HOME}: it would come back as a path"
        assert str(home).encode().hex() not in lines.lower(), f"{service} holds the home's path among bytes"
        (folder / f"{service}.sql").write_text(lines.replace(str(home), _HOME))
    (folder / ARCHIVE).write_bytes(lzma.compress(_archive(home), preset=lzma.PRESET_EXTREME))


def unpack_home(folder: Path, home: Path) -> None:
    """Make the home that `pack_home` wrote, at another path, in an empty folder.

    Answers to request ids are kept a week after their call: their rows are made an hour old, or none would be left.
    """
    with tarfile.open(folder / ARCHIVE) as archive:
        archive.extractall(home, filter="tar")
    for service in SERVICES:
        lines = (folder / f"{service}.sql").read_text().replace(_HOME, str(home))
        with closing(sqlite3.connect(_database(home, service))) as connection, connection:
            connection.executescript(lines)
            recent_us = time.time_ns() // 1000 - _HOUR_US
            connection.execute("UPDATE request_log SET created_at_us = ?", (recent_us,))


def _database(home: Path, service: str) -> Path:
    folder = home / service
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{service}.db"


def _archive(home: Path) -> bytes:
    """Return a tar of what the databases speak of: the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(_kept(home)):
            entry = tarfile.TarInfo(str(path.relative_to(home)))
            entry.size = path.stat().st_size
            entry.mode = 0o600
            with path.open("rb") as file:
                archive.addfile(entry, file)
    return buffer.getvalue()


def _kept(home: Path) -> Iterator[Path]:
    yield from (home / key for key in _KEYS)
    for folder in (home / "models", *(home / service / "blobs" for service in SERVICES)):
        yield from (path for path in folder.rglob("*") if path.is_file())
