"""Files on their way between the driver's machine and a rank's: by digest, in pieces, through Ray's object store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from luthier.errors import DataLoss, Reason
from luthier.storage.files import digest_of, exclusive
from luthier.training.executors.ray.post import PIECE_BYTES
from luthier.work.cache import BlobCache


class NodeFiles:
    """The files of one rank: those that it fetches stay in its node's cache, for the others there and for later.

    Args:
        post: has what is offered, and takes what is sent.
        cache: of the node.
        taking: a lock: of several ranks of a node one fetches, the others find it in the cache.
        check: called between pieces; shows signs of life.
    """

    def __init__(self, post: Any, cache: BlobCache, taking: Path, check: Callable[[], None]) -> None:
        self._post = post
        self._cache = cache
        self._taking = taking
        self._check = check

    def take(self, sha256: str, target: Path, size: Callable[[], int]) -> Path:
        """Make a file appear at `target`; do not change it there. `size` has it offered, where the node has it not.

        Raises:
            DataLoss: the bytes have another digest.
        """
        with exclusive(self._taking):
            return self._cache.take(sha256, target, lambda: self._pieces(sha256, size()))

    def send(self, paths: Sequence[Path], folder: str) -> None:
        """Send files to the driver's machine, under their names in a folder there; returns once they are there.

        Raises:
            DataLoss: other bytes have come.
        """
        for path in paths:
            self._send(path, f"{folder}/{path.name}")

    def _pieces(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        for number in range(math.ceil(size_bytes / PIECE_BYTES)):
            self._check()
            [piece] = ray.get(self._post.piece.remote(sha256, number))
            yield ray.get(piece)

    def _send(self, path: Path, place: str) -> None:
        with path.open("rb") as file:
            sha256 = digest_of(file)
            file.seek(0)
            offset = 0
            while (data := file.read(PIECE_BYTES)) or not offset:
                ray.get(self._post.keep.remote(place, offset, data))
                offset += len(data)
                if not data:
                    break
        found = ray.get(self._post.kept.remote(place))
        if found != sha256:
            raise DataLoss(
                reason=Reason.CHECKSUM_MISMATCH,
                message=f"the bytes of {path.name} that came to the driver have sha256 {found}, expected {sha256}",
                metadata={"sha256": sha256},
            )
