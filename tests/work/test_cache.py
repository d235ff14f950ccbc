"""A worker's cache: whole files or none, the least used go first."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import DataLoss
from luthier.storage.files import digest_of
from luthier.work.cache import BlobCache


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


def test_a_file_that_was_taken_outlives_its_place_in_the_cache(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 100)
    downloads: list[str] = []

    def download() -> list[bytes]:
        downloads.append("x")
        return [b"x" * 80]

    name = digest(b"x" * 80)
    taken = [cache.take(name, tmp_path / "model" / place, download) for place in ("a", "b", "a")]
    assert downloads == ["x"]
    cache.add(digest(b"y" * 80), [b"y" * 80])
    assert cache.find(name) is None, "it was evicted"
    assert [path.read_bytes() for path in taken] == [b"x" * 80] * 3


def test_a_file_evicted_between_finding_and_taking_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobCache(tmp_path / "cache", 1 << 20)
    store.add(digest(b"x"), [b"x"])
    found = BlobCache.find
    evictions = iter([True])

    def find_then_evict(self: BlobCache, sha256: str) -> Path | None:
        path = found(self, sha256)
        if path is not None and next(evictions, False):
            path.unlink()
        return path

    monkeypatch.setattr(BlobCache, "find", find_then_evict)
    target = store.take(digest(b"x"), tmp_path / "task" / "x", lambda: [b"x"])
    assert target.read_bytes() == b"x"


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied"])
def test_a_damaged_file_is_removed_and_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    data = b"weights" * 1000
    BlobCache(tmp_path / "cache", 1 << 20).add(digest(data), [data])
    path = tmp_path / "cache" / digest(data)
    status = path.stat()
    wrong = {"truncated": data[:100], "changed": b"W" + data[1:], "emptied": b""}[damage]
    path.write_bytes(wrong)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    cache = BlobCache(tmp_path / "cache", 1 << 20)  # another process, some days later
    taken = cache.take(digest(data), tmp_path / "task" / "weights", lambda: [data])
    assert taken.read_bytes() == data
    assert "cached file damaged, it is fetched again" in caplog.messages
    assert path.read_bytes() == data


def test_a_file_that_changes_is_hashed_again_and_one_that_does_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(file: Any) -> str:
        hashed.append(file.name)
        return digest_of(file)

    monkeypatch.setattr("luthier.work.cache.digest_of", counted)
    data = b"weights"
    BlobCache(tmp_path / "cache", 1 << 20).add(digest(data), [data])
    cache = BlobCache(tmp_path / "cache", 1 << 20)
    for number in range(3):
        cache.take(digest(data), tmp_path / "task" / str(number), lambda: [data])
    assert len(hashed) == 1
    (tmp_path / "cache" / digest(data)).write_bytes(data[:3])
    assert cache.find(digest(data)) is None
    assert len(hashed) == 2


def test_what_is_added_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20)
    synced: list[str] = []
    sync, name = os.fsync, tmp_path / "cache" / digest(b"x")

    def recorded(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        synced.append(f"{kind} {'after' if name.exists() else 'before'} the name")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    cache.add(digest(b"x"), [b"x"])
    assert synced == ["file before the name", "folder after the name"]
