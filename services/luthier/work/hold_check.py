"""Check that what is worked for holds what it is made from, and that nothing is held for what is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.stored import Rows, Stored
from luthier.v1.reference_pb2 import Reference
from luthier.work.blob_check import Fault
from luthier.work.schema import held_elsewhere, holds, tasks
from luthier.work.tasks import TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A family whose resources hold others.

    Attributes:
        rows: its resources.
        needed: what each of them is made from, and holds until that is done, here or at another service.
    """

    rows: Rows[Any, Any]
    needed: Callable[[Stored[Any, Any]], Iterable[Reference]]


def made_from(stored: Stored[Any, Any]) -> Iterable[Reference]:
    """Return all that the message of a resource says it was made from."""
    references: Iterable[Reference] = stored.message.references
    return references


async def hold_faults(connection: AsyncConnection, holders: Sequence[Holder]) -> AsyncIterator[Fault]:
    """Yield what is wrong with the holds of a service, as one transaction sees it.

    What has no task any more that is not over has ended, or was given up, and needs nothing until its end.
    """
    at_work = select(tasks.c.uid).where(tasks.c.state != TaskState.DONE)
    held = await _held_by(connection, at_work)
    for holder in holders:
        table = holder.rows.table
        mine = table.c.uid.in_(at_work), table.c.delete_time_us.is_(None)
        for row in (await connection.execute(select(table).where(*mine))).mappings():
            for fault in _unheld(holder.rows.of_row(row), holder, held):
                yield fault
    is_gone = and_(*(holds.c.hold.not_in(select(holder.rows.table.c.uid)) for holder in holders))
    has_ended = and_(~holds.c.lasting, holds.c.hold.not_in(at_work))
    stale = select(holds).where(holds.c.expire_time_us.is_(None), or_(is_gone, has_ended))
    for kept in (await connection.execute(stale.order_by(holds.c.hold, holds.c.held))).all():
        text = f"a row keeps {kept.held} from being deleted for what has ended or is not there: it stays for ever"
        yield Fault(kind="ownerless", digest="", who=kept.holder, text=text)


async def _held_by(connection: AsyncConnection, uids: Select[Any]) -> Collection[tuple[str, str]]:
    """Return what some resources hold: their uid, with the uid of what is here, the name of what is elsewhere."""
    here = select(holds.c.hold, holds.c.held).where(holds.c.hold.in_(uids))
    columns = held_elsewhere.c
    away = select(columns.holder_uid, columns.name).where(columns.holder_uid.in_(uids), ~columns.released)
    found: set[tuple[str, str]] = set()
    for statement in (here, away):
        found.update((row[0], row[1]) for row in await connection.execute(statement))
    return found


def _unheld(stored: Stored[Any, Any], holder: Holder, held: Collection[tuple[str, str]]) -> Iterator[Fault]:
    for one in holder.needed(stored):
        if (stored.uid, one.uid) not in held and (stored.uid, one.name) not in held:
            text = f"it needs {one.name or one.uid}, and no row keeps that from being deleted: report it"
            yield Fault(kind="unheld", digest="", who=stored.message.name, text=text)
