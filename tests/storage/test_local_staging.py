"""Uploads in progress in a directory: durable when told, one writer at a time, whole after a kill."""

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from luthier.storage.files import write_durably
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.local_staging import LocalStaging
from luthier.storage.staged_files import SYNC_BYTES

ABC = hashlib.sha256(b"abc").hexdigest()


def staging_in(root: Path) -> LocalStaging:
    return LocalStaging(root / "staging", LocalBlobStore(root))


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def stage_in_a_process_and_kill_it(root: Path) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from luthier.storage.local_blobs import LocalBlobStore\n"
        "from luthier.storage.local_staging import LocalStaging\n"
        "async def main():\n"
        "    root = pathlib.Path(sys.argv[1])\n"
        "    staging = LocalStaging(root / 'staging', LocalBlobStore(root))\n"
        "    print(await staging.append('k', 0, b'ab'), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "2\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


async def test_staged_bytes_survive_a_killed_process(tmp_path: Path) -> None:
    await asyncio.to_thread(stage_in_a_process_and_kill_it, tmp_path)
    staging = staging_in(tmp_path)
    assert await staging.size("k") == 2
    await staging.append("k", 2, b"c")
    assert (await staging.commit("k")).digest == ABC


async def test_commit_staged_finishes_a_commit_that_a_crash_cut_short(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    await staging.append("k", 0, b"abc")
    # The digest was recorded, the bytes had not moved yet.
    write_durably(tmp_path / "staging" / f"{hashlib.sha256(b'k').hexdigest()}.digest", ABC.encode())
    staging = staging_in(tmp_path)
    assert (await staging.commit("k")).digest == ABC
    assert await LocalBlobStore(tmp_path).read_bytes(ABC) == b"abc"
    await staging.discard("k")
    assert files(tmp_path) == {f"blobs/{ABC[:2]}/{ABC}"}


async def test_stage_at_one_offset_from_many_callers_takes_exactly_one(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    outcomes = await asyncio.gather(
        *(staging.append("k", 0, bytes([65 + i]) * 1000) for i in range(8)), return_exceptions=True
    )
    assert sorted(map(str, outcomes)).count("1000") == 1
    [path] = (tmp_path / "staging").iterdir()
    staged = path.read_bytes()
    assert staged == staged[:1] * 1000


async def test_commit_staged_from_many_callers_gives_all_the_same_blob(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    await staging.append("k", 0, b"abc")
    blobs = await asyncio.gather(*(staging.commit("k") for _ in range(8)))
    assert {blob.digest for blob in blobs} == {ABC}
    assert await LocalBlobStore(tmp_path).read_bytes(ABC) == b"abc"


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what was made durable, directories among them."""
    sizes: list[int] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    return sizes


async def test_staged_size_tells_only_what_it_has_made_durable(tmp_path: Path, synced: list[int]) -> None:
    staging = staging_in(tmp_path)
    synced.clear()
    await staging.append("k", 0, b"abc")
    assert synced == [], "nobody was told that they are stored"
    assert await staging.size("k") == 3
    assert synced[0] == 3
    assert len(synced) == 2, "the bytes, then the directory that names them"
    await staging.append("k", 3, b"d")
    assert await staging.size("k") == 4
    assert synced[2:] == [4]
    assert await staging.size("k") == 4
    assert synced[2:] == [4], "they are durable already"


async def test_staged_size_after_a_restart_makes_durable_what_an_earlier_process_wrote(
    tmp_path: Path, synced: list[int]
) -> None:
    await staging_in(tmp_path).append("k", 0, b"abc")
    staging = staging_in(tmp_path)
    synced.clear()
    assert await staging.size("k") == 3
    assert synced[0] == 3


async def test_commit_staged_makes_the_bytes_durable_first(tmp_path: Path, synced: list[int]) -> None:
    staging = staging_in(tmp_path)
    await staging.append("k", 0, b"abc" * 1000)
    await staging.commit("k")
    assert 3000 in synced


async def test_stage_keeps_few_bytes_that_are_not_durable(tmp_path: Path, synced: list[int]) -> None:
    staging = staging_in(tmp_path)
    piece = bytes(1 << 20)
    for number in range(40):
        await staging.append("k", number << 20, piece)
    assert [size for size in synced if size >= SYNC_BYTES] == [SYNC_BYTES, 2 * SYNC_BYTES]


async def test_commit_staged_of_bytes_from_several_stores_hashes_all_of_them(tmp_path: Path) -> None:
    first, second = staging_in(tmp_path), staging_in(tmp_path)
    await first.append("k", 0, b"a")
    await second.append("k", 1, b"b")
    await first.append("k", 2, b"c")
    assert (await first.commit("k")).digest == ABC
    await first.discard("k")
    # Whatever the first store had hashed of the former bytes is of no use for these.
    await second.append("k", 0, b"x")
    await first.append("k", 1, b"y")
    assert (await first.commit("k")).digest == hashlib.sha256(b"xy").hexdigest()


async def test_many_staged_files_do_not_stay_open(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        await staging.append(f"k{number}", 0, b"a")
    assert len(os.listdir("/proc/self/fd")) - open_before <= 64
    await staging.append("k0", 1, b"bc")
    assert (await staging.commit("k0")).digest == hashlib.sha256(b"abc").hexdigest()
    for number in range(100):
        await staging.discard(f"k{number}")
    assert len(os.listdir("/proc/self/fd")) <= open_before


async def test_what_a_former_version_committed_by_moving_it_is_that_blob(tmp_path: Path) -> None:
    """Its bytes are not staged any more: the file was moved, and its digest recorded."""
    blobs, staging = LocalBlobStore(tmp_path), staging_in(tmp_path)
    blob = await blobs.put_bytes(b"abc")
    write_durably(tmp_path / "staging" / f"{hashlib.sha256(b'k').hexdigest()}.digest", ABC.encode())
    assert await staging.size("k") == 3
    assert await staging.commit("k", expected_digest=ABC) == blob
    await staging.discard("k")
    assert await staging.size("k") == 0


async def test_staged_bytes_and_their_blob_are_the_same_on_the_disk(tmp_path: Path) -> None:
    staging = staging_in(tmp_path)
    await staging.append("k", 0, b"abc")
    await staging.commit("k")
    staged = tmp_path / "staging" / hashlib.sha256(b"k").hexdigest()
    assert staged.samefile(tmp_path / "blobs" / ABC[:2] / ABC)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM])
async def test_bytes_are_copied_where_two_names_for_them_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    staging = staging_in(tmp_path)
    await staging.append("k", 0, b"abc")
    monkeypatch.setattr(os, "link", refuse)
    blob = await staging.commit("k")
    await staging.discard("k")
    assert files(tmp_path) == {f"blobs/{blob.digest[:2]}/{blob.digest}"}


async def test_the_size_of_what_is_hashed_is_told_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that did not receive a large file itself reads all of it at its end."""
    await staging_in(tmp_path).append("k", 0, b"abc")
    staging, reads, go, real = staging_in(tmp_path), threading.Event(), threading.Event(), os.pread

    def held_up(descriptor: int, size_bytes: int, offset: int) -> bytes:
        reads.set()
        assert go.wait(60)
        return real(descriptor, size_bytes, offset)

    monkeypatch.setattr(os, "pread", held_up)
    committing = asyncio.create_task(staging.commit("k"))
    await asyncio.to_thread(reads.wait, 60)
    assert await asyncio.wait_for(staging.size("k"), 30) == 3
    go.set()
    assert (await committing).digest == ABC


@pytest.mark.parametrize("change", ["append", "discard", "cut"])
async def test_what_changes_while_it_is_hashed_is_not_taken_for_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """By another process: this one keeps its callers apart."""
    other = staging_in(tmp_path)
    await other.append("k", 0, b"abc")
    real, path = os.pread, tmp_path / "staging" / hashlib.sha256(b"k").hexdigest()

    def changing(descriptor: int, size_bytes: int, offset: int) -> bytes:
        data = real(descriptor, size_bytes, offset)
        if change == "append":
            path.write_bytes(b"abcd")
        if change == "discard":
            path.unlink()
            path.write_bytes(b"xyz")
        if change == "cut":
            os.truncate(path, 1)
            return data[:1]
        return data

    monkeypatch.setattr(os, "pread", changing)
    expected = {"append": b"abcd", "discard": b"xyz", "cut": b"a"}[change]
    assert (await staging_in(tmp_path).commit("k")).digest == hashlib.sha256(expected).hexdigest()
