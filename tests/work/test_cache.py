"""A worker's cache: whole files or none, the least used go first."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.errors import DataLoss
from luthier.work.cache import BlobCache
from luthier.work.model_files import place


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_added_is_found(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20)
    assert cache.find(digest(b"ab")) is None
    path = cache.add(digest(b"ab"), [b"a", b"b"])
    assert cache.find(digest(b"ab")) == path
    assert path.read_bytes() == b"ab"


def test_bytes_with_another_digest_leave_nothing(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20)
    with pytest.raises(DataLoss, match=digest(b"wanted")):
        cache.add(digest(b"wanted"), [b"other"])
    assert files_below(tmp_path / "cache") == []


def test_a_source_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20)

    def broken() -> list[bytes]:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.add(digest(b"x"), (chunk for chunk in broken()))
    assert files_below(tmp_path / "cache") == []


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = BlobCache(folder, 1 << 20)
    (left,) = [folder / ".incoming" / "left"]
    left.write_bytes(b"half")

    def chunks() -> Iterator[bytes]:
        yield b"a"
        BlobCache(folder, 1 << 20)  # another worker starts
        yield b"b"

    path = cache.add(digest(b"ab"), chunks())
    assert path.read_bytes() == b"ab"
    assert files_below(folder) == [path]


def test_the_least_used_go_first_and_the_newest_stays(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 250)
    contents = [bytes([number]) * 100 for number in range(3)]
    for age, data in zip((30, 20), contents, strict=False):
        os.utime(cache.add(digest(data), [data]), (1_000_000 - age,) * 2)
    cache.find(digest(contents[0]))  # used again
    cache.add(digest(contents[2]), [contents[2]])
    kept = [cache.find(digest(data)) is not None for data in contents]
    assert kept == [True, False, True]
    big = b"z" * 1000
    cache.add(digest(big), [big])
    assert cache.find(digest(big)) is not None, "what was asked for is there, whatever the limit"


def test_a_placed_file_outlives_its_place_in_the_cache(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20)
    source = cache.add(digest(b"x"), [b"x"])
    place(source, tmp_path / "model" / "file")
    place(source, tmp_path / "model" / "file")
    source.unlink()
    assert (tmp_path / "model" / "file").read_bytes() == b"x"
