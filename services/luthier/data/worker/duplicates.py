"""Which records were seen before, in a file: memory stays bounded however many there are."""

from __future__ import annotations

import sqlite3
from pathlib import Path

_CACHE_KIB = 32 * 1024


class SeenRecords:
    """A set of record ids in a temporary SQLite file. Memory: a page cache of 32 MiB."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # The file lives as long as one task: nothing of it needs to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._connection.execute("BEGIN")

    def add(self, record_id: str) -> bool:
        """Add an id (hex); return whether it is new."""
        statement = "INSERT OR IGNORE INTO seen VALUES (?)"
        return self._connection.execute(statement, (bytes.fromhex(record_id),)).rowcount == 1

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
