"""Files between a driver and ranks, by digest: the post is real, and what Ray does between them is left out."""

from __future__ import annotations

# What is not installed is asked for before it is imported.
# ruff: noqa: E402
import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs the extra ray")

from luthier.errors import DataLoss
from luthier.training.executors.ray.files import NodeFiles
from luthier.training.executors.ray.post import Post
from luthier.work.cache import BlobCache


class Nearby:
    """A post in this process, called as an actor is."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return _Call(lambda *arguments: self._called(name, arguments))

    def _called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        self.called.append(name)
        return asyncio.run(getattr(self.post, name)(*arguments))


class _Call:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


@pytest.fixture
def post(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nearby:
    for name in ("get", "put"):
        monkeypatch.setattr(ray, name, lambda value: value)
    for module in ("post", "files"):
        monkeypatch.setattr(f"luthier.training.executors.ray.{module}.PIECE_BYTES", 1000)
    return Nearby(Post(tmp_path / "ranks"))


def node(post: Nearby, home: Path) -> NodeFiles:
    home.mkdir(exist_ok=True)
    return NodeFiles(post, BlobCache(home / "cache", 1 << 20), home / "taking", lambda: None)


def written(path: Path, size: int) -> str:
    data = bytes(number % 251 for number in range(size))
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2500])
def test_a_file_comes_to_each_node_once(post: Nearby, tmp_path: Path, size: int) -> None:
    sha256 = written(tmp_path / "base", size)
    asyncio.run(post.post.offer(sha256, tmp_path / "base"))
    asked: list[int] = []

    def offered() -> int:
        asked.append(size)
        return size

    for rank in range(2):
        taken = node(post, tmp_path / "node").take(sha256, tmp_path / f"rank-{rank}" / "base", offered)
        assert taken.read_bytes() == (tmp_path / "base").read_bytes()
    assert len(asked) == 1
    assert post.called.count("piece") == -(-size // 1000)


def test_what_came_with_another_digest_is_not_kept(post: Nearby, tmp_path: Path) -> None:
    written(tmp_path / "base", 10)
    wrong = hashlib.sha256(b"other").hexdigest()
    asyncio.run(post.post.offer(wrong, tmp_path / "base"))
    with pytest.raises(DataLoss, match=wrong):
        node(post, tmp_path / "node").take(wrong, tmp_path / "rank" / "base", lambda: 10)
    assert not (tmp_path / "rank" / "base").exists()


@pytest.mark.parametrize("size", [0, 1000, 2500])
def test_what_a_rank_made_comes_to_the_driver(post: Nearby, tmp_path: Path, size: int) -> None:
    written(tmp_path / "adapter", size)
    node(post, tmp_path / "node").send([tmp_path / "adapter"], "step-3")
    assert (tmp_path / "ranks" / "step-3" / "adapter").read_bytes() == (tmp_path / "adapter").read_bytes()


def test_what_came_otherwise_than_it_was_sent_is_an_error(
    post: Nearby, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def keep(place: str, offset: int, data: bytes) -> None:
        await Post.keep(post.post, place, offset, data[::-1])

    written(tmp_path / "adapter", 100)
    monkeypatch.setattr(post.post, "keep", keep)
    with pytest.raises(DataLoss, match="the bytes of adapter that came to the driver"):
        node(post, tmp_path / "node").send([tmp_path / "adapter"], "step-3")
