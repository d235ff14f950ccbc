"""The post between ranks and the process that drives them: an actor of the cluster, beside that process.

Ranks leave letters and wait for answers, sentries leave what they saw, files come and go in pieces. It has no
credential and no setting: what a rank may have of files is what the driver has offered, by digest.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from luthier.storage.files import digest_of, path_below
from luthier.training.executors.pulse import Shown

PIECE_BYTES = 16 << 20
_KEPT_PIECES = 16
"""Of files that several nodes fetch: these have been read and stay in the object store, whence nodes pass them on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What a rank tells its driver, or asks of it.

    Attributes:
        rank: who.
        name: of the call.
        arguments: of it.
        named: more of them.
        number: of the answer that the rank waits for; None: it waits for none.
    """

    rank: int
    name: str
    arguments: Sequence[Any] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None


class Post:
    """Keeps letters until the driver takes them, and files in a folder of the driver's machine.

    Args:
        folder: where files of ranks go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._letters: list[Letter] = []
        self._sights: dict[int, Shown] = {}
        self._arrived = asyncio.Event()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._num_asked = 0
        self._offered: dict[str, Path] = {}
        self._pieces: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._reading = asyncio.Lock()

    async def tell(
        self, rank: int, name: str, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> None:
        """Leave a letter that needs no answer."""
        self._letters.append(Letter(rank=rank, name=name, arguments=arguments, named=named or {}))
        self._arrived.set()

    async def ask(self, rank: int, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Leave a letter and return the answer, whenever it comes."""
        self._num_asked += 1
        number = self._num_asked
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._letters.append(Letter(rank=rank, name=name, arguments=arguments, number=number))
        self._arrived.set()
        return await answer

    async def answer(self, number: int, value: Any) -> None:
        """Answer a letter."""
        self._answers.pop(number).set_result(value)

    async def see(self, sights: Mapping[int, Shown]) -> None:
        """Take what a sentry sees of ranks."""
        self._sights.update(sights)

    async def taken(self, seconds: float) -> tuple[list[Letter], dict[int, Shown]]:
        """Return the letters that have come, in that order, waiting so long for one, and what was last seen."""
        try:
            await asyncio.wait_for(self._arrived.wait(), seconds)
        except TimeoutError:
            return [], dict(self._sights)
        letters, self._letters = self._letters, []
        self._arrived.clear()
        return letters, dict(self._sights)

    async def offer(self, sha256: str, path: Path) -> None:
        """Let ranks have a file of this machine, by its digest."""
        self._offered[sha256] = path

    async def piece(self, sha256: str, number: int) -> list[Any]:
        """Return a piece of a file that is offered, as a reference into the object store in a list.

        Nodes that fetch it get it from one another too.
        """
        place = (sha256, number)
        async with self._reading:
            if place not in self._pieces:
                data = await asyncio.to_thread(_read, self._offered[sha256], number * PIECE_BYTES)
                self._pieces[place] = ray.put(data)
            self._pieces.move_to_end(place)
            while len(self._pieces) > _KEPT_PIECES:
                self._pieces.popitem(last=False)
            return [self._pieces[place]]

    async def keep(self, place: str, offset: int, data: bytes) -> None:
        """Write a piece of a rank's file at a place in the folder."""
        await asyncio.to_thread(_write, path_below(self._folder, place), offset, data)

    async def kept(self, place: str) -> str:
        """Return the digest of what has come of a rank's file."""
        return await asyncio.to_thread(_digest, path_below(self._folder, place))


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)


def _write(path: Path, offset: int, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb" if offset == 0 else "r+b") as file:
        file.seek(offset)
        file.write(data)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return digest_of(file)
