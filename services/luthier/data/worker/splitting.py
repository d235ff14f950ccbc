"""Which split each record of a version goes to, and what its makers should know of how they came out."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier.data.splits import SPLITS, assign_split, split_name
from luthier.text.records import Record, prompt_id
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_VALIDATION, Split, SplitSettings

_CACHE_KIB = 32 * 1024
_NEVER = math.log(1e6)
"""Records that are divided one by one are as far from a share once in a million times at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where records come from: the file, and its fixed split; unspecified: the hash of each record's prompt decides."""

    filename: str
    split: Split.ValueType


class Splitter:
    """Gives each record its split: its source's, else that of the hash of its prompt.

    A record without a prompt goes by its own id. Memory: counts, and a page cache of 32 MiB where prompts are compared.

    Args:
        settings: shares and seed.
        prompts: file for the prompts, where those of different splits are to be compared: those of sources that have
            different splits, as the hash never parts records of one prompt.
    """

    def __init__(self, settings: SplitSettings, prompts: Path | None) -> None:
        self._settings = settings
        self._prompts = None if prompts is None else _Prompts(prompts)
        self._hashed = dict.fromkeys(SPLITS, 0)
        self._num_straddling = 0
        self._first_straddling = ""

    def split_of(self, record: Record, record_id: str, place: Place, line: int) -> Split.ValueType:
        """Return the split of a record that is no duplicate."""
        if place.split and self._prompts is None:
            return place.split
        prompt = prompt_id(record)
        split = place.split or assign_split(prompt or record_id, self._settings)
        if not place.split:
            self._hashed[split] += 1
        if self._prompts is not None and prompt is not None:
            self._compare(self._prompts, prompt, split, f"{place.filename}:{line}")
        return split

    def warnings(self) -> Iterator[str]:
        """Yield what is so of the splits that nobody may have meant."""
        if self._num_straddling:
            prompts = (
                "1 prompt stands" if self._num_straddling == 1 else f"{self._num_straddling:,} prompts stand"
            )
            yield (
                f"{prompts} in more than one split, as sources have splits of their own: what one split teaches "
                f"another asks; the first is {self._first_straddling}"
            )
        yield from self._share_warning(
            SPLIT_VALIDATION, "validation_fraction", self._settings.validation_fraction
        )
        yield from self._share_warning(SPLIT_TEST, "test_fraction", self._settings.test_fraction)

    def close(self) -> None:
        """Close the file."""
        if self._prompts is not None:
            self._prompts.close()

    def _share_warning(self, split: Split.ValueType, field: str, share: float) -> Iterator[str]:
        """Yield what is so where a share of the records is far from what was asked for, or is nothing."""
        found, total = self._hashed[split], sum(self._hashed.values())
        is_far = _improbability(found, total, share) > _NEVER
        if is_far or (share * total > 0 and not found):
            why = "records that begin by asking the same stay together" if is_far else "they are few"
            yield (
                f"{found:,} of the {total:,} records that the hash divides ({found / total:.1%}) are in the "
                f"{split_name(split).lower()} split, where {field} asks for {share:.1%}: {why}"
            )

    def _compare(self, prompts: _Prompts, prompt: str, split: Split.ValueType, place: str) -> None:
        first = prompts.add(prompt, split, place)
        if first is None:
            return
        self._num_straddling += 1
        self._first_straddling = self._first_straddling or (
            f"{place} ({split_name(split).lower()}), which asks what {first.place} "
            f"({split_name(first.split).lower()}) asks"
        )


def _improbability(found: int, total: int, share: float) -> float:
    """Return -log of Chernoff's bound on how probable it is that so many of `total` fall into a share."""
    parts = ((found, share), (total - found, 1 - share))
    return sum(count * math.log(count / (total * part)) for count, part in parts if count)


@dataclass(frozen=True, slots=True, kw_only=True)
class _First:
    """The first record of a prompt."""

    split: Split.ValueType
    place: str


class _Prompts:
    """The split and place of the first record of each prompt, in a file: memory is bounded however many there are."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # The file lives as long as one task: nothing of it needs to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE prompts (id BLOB PRIMARY KEY, split INTEGER, place TEXT, straddles INTEGER) WITHOUT ROWID"
        )
        self._connection.execute("BEGIN")

    def add(self, prompt: str, split: Split.ValueType, place: str) -> _First | None:
        """Add a record of a prompt (hex); return the first one where this is the first in another split."""
        key = bytes.fromhex(prompt)
        added = self._connection.execute(
            "INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, 0)", (key, split, place)
        )
        if added.rowcount:
            return None
        found = self._connection.execute(
            "UPDATE prompts SET straddles = 1 WHERE id = ? AND split <> ? AND straddles = 0 RETURNING split, place",
            (key, split),
        ).fetchone()
        return None if found is None else _First(split=found[0], place=found[1])

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
