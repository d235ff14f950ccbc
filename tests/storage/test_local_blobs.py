import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from luthier.errors import LuthierError
from luthier.storage.files import open_locked, write_durably
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.staged_files import SYNC_BYTES

ABC = hashlib.sha256(b"abc").hexdigest()


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_put_writes_the_documented_layout_and_nothing_else(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.put_bytes(b"abc")
    await store.put_bytes(b"abc")
    assert files(tmp_path) == {f"blobs/{ABC[:2]}/{ABC}"}


async def test_put_that_fails_or_is_cancelled_leaves_no_file(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"abc"
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(store.put(endless()))
    await started.wait()
    assert len(files(tmp_path)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(LuthierError):
        await store.put(aiter_of(b"abc"), expected_digest="0" * 64)
    assert files(tmp_path) == set()


async def aiter_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_start_sweeps_what_a_killed_writer_left_and_spares_a_living_one(tmp_path: Path) -> None:
    LocalBlobStore(tmp_path)
    (tmp_path / "incoming" / "left").write_bytes(b"half")
    with open_locked(tmp_path / "incoming" / "live"):
        LocalBlobStore(tmp_path)
        assert files(tmp_path) == {"incoming/live"}
    LocalBlobStore(tmp_path)
    assert files(tmp_path) == set()


def stage_in_a_process_and_kill_it(root: Path) -> None:
    script = (
        "import asyncio, sys, pathlib\n"
        "from luthier.storage.local_blobs import LocalBlobStore\n"
        "async def main():\n"
        "    store = LocalBlobStore(pathlib.Path(sys.argv[1]))\n"
        "    print(await store.stage('k', 0, b'ab'), flush=True)\n"
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
    store = LocalBlobStore(tmp_path)
    assert await store.staged_size("k") == 2
    await store.stage("k", 2, b"c")
    assert (await store.commit_staged("k")).digest == ABC


async def test_commit_staged_finishes_a_commit_that_a_crash_cut_short(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.stage("k", 0, b"abc")
    # The digest was recorded, the bytes had not moved yet.
    write_durably(tmp_path / "staging" / f"{hashlib.sha256(b'k').hexdigest()}.digest", ABC.encode())
    store = LocalBlobStore(tmp_path)
    assert (await store.commit_staged("k")).digest == ABC
    assert await store.read_bytes(ABC) == b"abc"
    await store.discard_staged("k")
    assert files(tmp_path) == {f"blobs/{ABC[:2]}/{ABC}"}


async def test_stage_at_one_offset_from_many_callers_takes_exactly_one(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    outcomes = await asyncio.gather(
        *(store.stage("k", 0, bytes([65 + i]) * 1000) for i in range(8)), return_exceptions=True
    )
    assert sorted(map(str, outcomes)).count("1000") == 1
    staged = next((tmp_path / "staging").iterdir()).read_bytes()
    assert staged == staged[:1] * 1000


async def test_commit_staged_from_many_callers_gives_all_the_same_blob(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.stage("k", 0, b"abc")
    blobs = await asyncio.gather(*(store.commit_staged("k") for _ in range(8)))
    assert {blob.digest for blob in blobs} == {ABC}
    assert await store.read_bytes(ABC) == b"abc"


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
    store = LocalBlobStore(tmp_path)
    synced.clear()
    await store.stage("k", 0, b"abc")
    assert synced == [], "nobody was told that they are stored"
    assert await store.staged_size("k") == 3
    assert synced[0] == 3
    assert len(synced) == 2, "the bytes, then the directory that names them"
    await store.stage("k", 3, b"d")
    assert await store.staged_size("k") == 4
    assert synced[2:] == [4]
    assert await store.staged_size("k") == 4
    assert synced[2:] == [4], "they are durable already"


async def test_staged_size_after_a_restart_makes_durable_what_an_earlier_process_wrote(
    tmp_path: Path, synced: list[int]
) -> None:
    await LocalBlobStore(tmp_path).stage("k", 0, b"abc")
    store = LocalBlobStore(tmp_path)
    synced.clear()
    assert await store.staged_size("k") == 3
    assert synced[0] == 3


async def test_commit_staged_makes_the_bytes_durable_first(tmp_path: Path, synced: list[int]) -> None:
    store = LocalBlobStore(tmp_path)
    await store.stage("k", 0, b"abc" * 1000)
    await store.commit_staged("k")
    assert 3000 in synced


async def test_stage_keeps_few_bytes_that_are_not_durable(tmp_path: Path, synced: list[int]) -> None:
    store = LocalBlobStore(tmp_path)
    piece = bytes(1 << 20)
    for number in range(40):
        await store.stage("k", number << 20, piece)
    assert [size for size in synced if size >= SYNC_BYTES] == [SYNC_BYTES, 2 * SYNC_BYTES]


async def test_commit_staged_of_bytes_from_several_stores_hashes_all_of_them(tmp_path: Path) -> None:
    first, second = LocalBlobStore(tmp_path), LocalBlobStore(tmp_path)
    await first.stage("k", 0, b"a")
    await second.stage("k", 1, b"b")
    await first.stage("k", 2, b"c")
    assert (await first.commit_staged("k")).digest == ABC
    await first.discard_staged("k")
    # Whatever the first store had hashed of the former bytes is of no use for these.
    await second.stage("k", 0, b"x")
    await first.stage("k", 1, b"y")
    assert (await first.commit_staged("k")).digest == hashlib.sha256(b"xy").hexdigest()


async def test_many_staged_files_do_not_stay_open(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        await store.stage(f"k{number}", 0, b"a")
    assert len(os.listdir("/proc/self/fd")) - open_before <= 64
    await store.stage("k0", 1, b"bc")
    assert (await store.commit_staged("k0")).digest == hashlib.sha256(b"abc").hexdigest()
    for number in range(100):
        await store.discard_staged(f"k{number}")
    assert len(os.listdir("/proc/self/fd")) <= open_before


async def test_read_closes_its_file_when_the_reader_stops_early(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    blob = await store.put_bytes(b"x" * (3 << 20))
    open_before = len(os.listdir("/proc/self/fd"))
    stream = store.read(blob.digest)
    assert len(await anext(stream)) == 1 << 20
    await stream.aclose()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == open_before
