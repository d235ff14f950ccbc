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


async def test_stage_syncs_the_bytes_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    store = LocalBlobStore(tmp_path)
    monkeypatch.setattr(os, "fsync", recording)
    await store.stage("k", 0, b"abc")
    assert synced[0] == 3
    assert len(synced) == 2, "the bytes, then the directory that names them"


async def test_read_closes_its_file_when_the_reader_stops_early(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    blob = await store.put_bytes(b"x" * (3 << 20))
    open_before = len(os.listdir("/proc/self/fd"))
    stream = store.read(blob.digest)
    assert len(await anext(stream)) == 1 << 20
    await stream.aclose()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == open_before
