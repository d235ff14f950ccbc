"""Letters, sights and pieces of files, and what an attempt leaves on a node: without a cluster."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from luthier.errors import InvalidArgument
from luthier.training.executors.pulse import Shown
from luthier.training.executors.ray import sentry
from luthier.training.executors.ray.post import Post
from luthier.training.executors.ray.sentry import _held, _left, swept


async def test_letters_come_in_their_order_and_each_answer_to_who_asked(tmp_path: Path) -> None:
    post = Post(tmp_path)
    await post.tell(0, "metrics", (1, {"loss": 2.0}))
    first, second = (asyncio.create_task(post.ask(rank, "bring", (f"f{rank}",))) for rank in (0, 1))
    await asyncio.sleep(0)
    letters, _ = await post.taken(5.0)
    assert [(one.rank, one.name) for one in letters] == [(0, "metrics"), (0, "bring"), (1, "bring")]
    assert letters[0].number is None
    for letter in reversed(letters[1:]):
        assert letter.number is not None
        await post.answer(letter.number, f"for {letter.arguments[0]}")
    assert (await first, await second) == ("for f0", "for f1")
    assert await post.taken(0.0) == ([], {})


async def test_sights_stay_until_there_are_newer_ones(tmp_path: Path) -> None:
    post = Post(tmp_path)
    one, two = (Shown(pid=7, beats=beats, entered=0, left=0, num_bytes=0) for beats in (1, 2))
    await post.see({0: one, 1: one})
    await post.see({1: two})
    assert (await post.taken(0.0))[1] == {0: one, 1: two}


async def test_files_of_ranks_come_in_pieces_below_the_folder(tmp_path: Path) -> None:
    post = Post(tmp_path / "ranks")
    for _ in range(2):  # as a step that is made again sends its file again
        await post.keep("step-3/adapter", 0, b"abc")
        await post.keep("step-3/adapter", 3, b"de")
        assert (tmp_path / "ranks" / "step-3" / "adapter").read_bytes() == b"abcde"
        assert await post.kept("step-3/adapter") == hashlib.sha256(b"abcde").hexdigest()
    with pytest.raises(InvalidArgument, match="must be a path below its folder"):
        await post.keep("../elsewhere", 0, b"x")


def test_what_attempts_left_on_a_node_is_known_by_nobody_holding_it(tmp_path: Path) -> None:
    held = _held(tmp_path / "now")
    (tmp_path / "before").mkdir()
    _held(tmp_path / "killed").close()
    assert sorted(path.name for path in _left(tmp_path)) == ["before", "killed"]
    held.close()
    assert len(list(_left(tmp_path))) == 3


def test_a_folder_that_is_being_made_is_nobodys_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts that begin on one node at once: the second sweeps while the first has made its folder."""
    is_made, goes_on = Event(), Event()

    def held(folder: Path) -> Any:
        folder.mkdir()
        is_made.set()
        assert goes_on.wait(10.0)
        return _held(folder)

    monkeypatch.setattr(sentry, "_held", held)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(swept, tmp_path, tmp_path / "first")
        assert is_made.wait(10.0)
        second = threads.submit(swept, tmp_path, tmp_path / "second")
        with pytest.raises(TimeoutError):
            second.result(0.3)
        goes_on.set()
        locks = [first.result(10.0), second.result(10.0)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["first", "second"]
    assert (tmp_path / "first" / ".lock").exists()
    for lock in locks:
        lock.close()
