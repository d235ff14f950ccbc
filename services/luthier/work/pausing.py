"""Pausing the resources of a family, and going on with them: nothing of their work is lost, and no worker is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import FailedPrecondition
from luthier.storage.database import Database
from luthier.storage.resource_messages import StatefulMessage
from luthier.storage.stored import require_etag
from luthier.work.families import Family, Tasks

M = TypeVar("M", bound=StatefulMessage)
P = TypeVar("P", bound=Message)


class PausableTasks(Tasks, Protocol):
    """Where work for workers is queued, and can be held back."""

    async def request_pause(self, connection: AsyncConnection, uid: str) -> None:
        """Have the tasks of a resource given to nobody, in the caller's transaction."""
        ...

    async def resume(self, connection: AsyncConnection, uid: str) -> bool:
        """Queue the paused tasks of a resource again, in the caller's transaction. Returns whether there was any."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseStates:
    """The states of a resource while it waits for a worker, while its worker is to give it back, and while it rests."""

    queued: int
    pausing: int
    paused: int


class Pausing(Generic[M, P]):
    """Pauses the resources of one family. Their handler moves them to the paused state once no worker has them."""

    def __init__(
        self, family: Family[M, P], database: Database, tasks: PausableTasks, states: PauseStates
    ) -> None:
        self._family = family
        self._database = database
        self._tasks = tasks
        self._states = states

    async def pause(self, name: str, etag: str) -> M:
        """Ask a resource to pause; one that is paused, or is about to be, stays as it is.

        Raises:
            NotFound: none has this name.
            Aborted: ETAG_MISMATCH.
            FailedPrecondition: WRONG_STATE; it has ended, or is stopping.
        """
        states, lifecycle = self._states, self._family.lifecycle
        async with self._database.transaction(makes_room=True) as connection:
            stored = await self._family.get(connection, name)
            require_etag(stored, etag)
            state: int = stored.message.state
            if state in (states.pausing, states.paused):
                return stored.message
            # One that no worker has needs nobody to give it back.
            if lifecycle.may_become(state, states.pausing):
                await self._family.move(connection, stored, states.pausing)
            elif not lifecycle.may_become(state, states.paused):
                right = [lifecycle.name(states.queued), *lifecycle.leading_to(states.pausing)]
                raise self._wrong(name, state, right, "paused")
            await self._tasks.request_pause(connection, stored.uid)
            return (await self._family.get(connection, name)).message

    async def resume(self, name: str, etag: str) -> M:
        """Queue a paused resource again.

        Raises:
            NotFound: none has this name.
            Aborted: ETAG_MISMATCH.
            FailedPrecondition: WRONG_STATE; it is not paused, or its work was given up meanwhile.
        """
        states = self._states
        async with self._database.transaction() as connection:
            stored = await self._family.get(connection, name)
            require_etag(stored, etag)
            state: int = stored.message.state
            if state != states.paused:
                hint = ": wait until its worker has given it back" if state == states.pausing else ""
                right = [self._family.lifecycle.name(states.paused)]
                raise self._wrong(name, state, right, "resumed", hint)
            moved = await self._family.move(connection, stored, states.queued, why="resumed")
            if not await self._tasks.resume(connection, moved.uid):
                raise FailedPrecondition(
                    f"{name} must have work that was paused to be resumed, that was given up; cancel it",
                    metadata={"name": name, "state": self._family.lifecycle.name(state)},
                )
            return moved.message

    def _wrong(
        self, name: str, state: int, right: Sequence[str], what: str, hint: str = ""
    ) -> FailedPrecondition:
        now = self._family.lifecycle.name(state)
        return FailedPrecondition(
            f"{name} must be {' or '.join(right)} to be {what}, it is {now}{hint}",
            metadata={"name": name, "state": now},
        )
