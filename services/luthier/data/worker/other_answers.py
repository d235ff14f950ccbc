"""Which other record's answer stands behind a labelled record's prompt: kept in a file, memory stays bounded."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.text.records import (
    ChatRecord,
    CompletionRecord,
    Record,
    SingleRecord,
    prompt_id,
    record_from_json,
    record_to_json,
)

MAX_LOOKED_AT = 1000
"""Records that are looked at for one with another prompt and another answer."""
_CACHE_KIB = 32 * 1024


class OtherAnswers:
    """Answers of labelled records in the order of their ids, in a temporary SQLite file.

    A record gets the answer of the next record of its split that has another prompt and another answer, the first one
    following the last. Ids are hashes, so that this order says nothing of the records, and adding records to a version
    changes only who stands before them. Conversations get answers of conversations, plain text that of plain text.
    Memory: a page cache of 32 MiB.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # The file lives as long as one task: nothing of it needs to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE answers (shelf TEXT, id BLOB, prompt BLOB, answer BLOB, text TEXT)"
        )
        self._connection.execute("BEGIN")

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a stored record; one without a label has no answer that another could get."""
        record = record_from_json(row["record"])
        if not _is_labelled(record):
            return
        prompt, answer, text = _told(record)
        values = (_shelf(row, record), bytes.fromhex(row["record_id"]), prompt, answer, text)
        self._connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", values)

    def finish(self) -> None:
        """All records are there, and can be asked for."""
        self._connection.execute("CREATE INDEX in_order ON answers (shelf, id, prompt, answer)")

    def after(self, row: Mapping[str, Any]) -> str:
        """Return the canonical JSON of a record that has the answer for a stored record, and no prompt.

        Empty when none of the `MAX_LOOKED_AT` records after it has another prompt and another answer, and for a record
        without a label.
        """
        record = record_from_json(row["record"])
        if not _is_labelled(record):
            return ""
        prompt, answer, _ = _told(record)
        following = self._following(_shelf(row, record), bytes.fromhex(row["record_id"]))
        for place, other_prompt, other_answer in islice(following, MAX_LOOKED_AT):
            if other_prompt != prompt and other_answer != answer:
                (text,) = self._connection.execute(
                    "SELECT text FROM answers WHERE rowid = ?", (place,)
                ).fetchone()
                return str(text)
        return ""

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _following(self, shelf: str, record_id: bytes) -> Iterator[tuple[int, bytes, bytes]]:
        for side in (">", "<"):
            yield from self._connection.execute(
                f"SELECT rowid, prompt, answer FROM answers WHERE shelf = ? AND id {side} ? ORDER BY id",
                (shelf, record_id),
            )


def _is_labelled(record: Record) -> bool:
    return isinstance(record, ChatRecord | CompletionRecord) and record.label is not None


def _shelf(row: Mapping[str, Any], record: Record) -> str:
    return f"{row['split']} {type(record).__name__}"


def _told(record: Record) -> tuple[bytes, bytes, str]:
    """Return what tells a labelled record's prompt and its answer from others', and the answer as a record."""
    alone = _answer_alone(record)
    text = record_to_json(alone)
    return bytes.fromhex(prompt_id(record) or ""), hashlib.sha256(text.encode()).digest(), text


def _answer_alone(record: Record) -> SingleRecord:
    if isinstance(record, ChatRecord):
        return ChatRecord(messages=(replace(record.messages[-1], weight=None),))
    assert isinstance(record, CompletionRecord), "pairs have no label"
    return CompletionRecord(prompt="", completion=record.completion)
