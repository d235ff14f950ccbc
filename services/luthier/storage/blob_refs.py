"""Which blobs are needed, and by whom: rows that keep bytes, written in the transaction that makes the need.

An owner is the uid of a resource, `<uid>/<part>` for what goes with it and is kept in rows of its own, or
`tasks/<id>` for what a worker was promised. A blob that nobody refers to any more is noted as loose, in the
transaction that drops the last reference, and collected a while later (`work.collecting`). One that no row ever named
is noted as loose from a time on that is far ahead.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Index,
    MetaData,
    String,
    Table,
    and_,
    delete,
    func,
    or_,
    select,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage import dialect

metadata = MetaData()
"""Part of every database with resources or tasks: `work.schema` takes these tables over."""

blob_refs = Table(
    "blob_refs",
    metadata,
    Column("owner", String, primary_key=True),
    Column("digest", String, primary_key=True),
    Index("ix_blob_refs_digest", "digest"),
)

loose_blobs = Table(
    "loose_blobs",
    metadata,
    Column("digest", String, primary_key=True),
    Column("since_us", BigInteger, nullable=False),
    Index("ix_loose_blobs_since", "since_us"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    """A blob that nobody refers to, and since when: in microseconds since 1970."""

    digest: str
    since_us: int


FIRST_LOOSE = Loose(digest="", since_us=-1)
"""Before all that are loose."""
_AFTER_SLASH = chr(ord("/") + 1)


def digests_in(message: Message) -> Iterator[str]:
    """Yield the digest of every file that a message names, however deep: each is in a field that ends with sha256."""
    for field, value in message.ListFields():
        if field.name == "sha256" or field.name.endswith("_sha256"):
            yield from value if field.is_repeated else (value,)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else (value,):
                yield from digests_in(part)


def task_owner(task_id: str) -> str:
    """Return the owner that stands for a task."""
    return f"tasks/{task_id}"


async def refer(connection: AsyncConnection, owner: str, digests: Iterable[str]) -> None:
    """Have an owner refer to blobs, beside those that it refers to already."""
    rows = [{"owner": owner, "digest": digest} for digest in dict.fromkeys(digests)]
    if rows:
        await connection.execute(dialect.insert(blob_refs).on_conflict_do_nothing(), rows)


async def refer_instead(
    connection: AsyncConnection, owner: str, before: Collection[str], after: Collection[str]
) -> None:
    """Have an owner that referred to some blobs refer to others. Those that are among both stay."""
    await refer(connection, owner, [digest for digest in after if digest not in before])
    gone = set(before).difference(after)
    for some in _in_parts(sorted(gone)):
        await _drop(connection, and_(blob_refs.c.owner == owner, blob_refs.c.digest.in_(some)))


async def drop(connection: AsyncConnection, *owners: str) -> None:
    """Let go all blobs of some owners."""
    for some in _in_parts(owners):
        await _drop(connection, blob_refs.c.owner.in_(some))


async def drop_some(connection: AsyncConnection, owner: str, digests: Iterable[str]) -> None:
    """Let go some blobs of an owner; those that are not its own are passed over."""
    await refer_instead(connection, owner, set(digests), ())


async def drop_whole(connection: AsyncConnection, uid: str, most: int | None = None) -> int:
    """Let go blobs of a resource and of its parts: all, or so many references at most; return how many those were."""
    owner, keys = blob_refs.c.owner, (blob_refs.c.owner, blob_refs.c.digest)
    mine = or_(owner == uid, and_(owner > f"{uid}/", owner < uid + _AFTER_SLASH))
    if most is None:
        return await _drop(connection, mine)
    return await _drop(connection, tuple_(*keys).in_(select(*keys).where(mine).limit(most)))


async def referred(connection: AsyncConnection, owner: str, digests: Collection[str]) -> bool:
    """Tell whether an owner refers to each of some blobs."""
    wanted, found = set(digests), 0
    for some in _in_parts(sorted(wanted)):
        statement = select(func.count()).where(blob_refs.c.owner == owner, blob_refs.c.digest.in_(some))
        found += (await connection.execute(statement)).scalar_one()
    return found == len(wanted)


async def needed(connection: AsyncConnection, digests: Sequence[str]) -> frozenset[str]:
    """Return those of some blobs, at most a few hundred, that somebody refers to."""
    statement = select(blob_refs.c.digest).where(blob_refs.c.digest.in_(digests)).distinct()
    return frozenset((await connection.execute(statement)).scalars())


async def loose_since(connection: AsyncConnection, digests: Sequence[str]) -> dict[str, int]:
    """Return since when those of some blobs are loose that are, in microseconds since 1970."""
    columns = loose_blobs.c
    statement = select(columns.digest, columns.since_us).where(columns.digest.in_(digests))
    return {row.digest: row.since_us for row in await connection.execute(statement)}


async def loose_before(
    connection: AsyncConnection, before_us: int, after: Loose, limit: int
) -> Sequence[Loose]:
    """Return at most `limit` blobs that are loose since a time or longer, the longest first, from after one on."""
    columns = loose_blobs.c
    order = (columns.since_us, columns.digest)
    statement = (
        select(columns.digest, columns.since_us)
        .where(columns.since_us <= before_us, tuple_(*order) > tuple_(after.since_us, after.digest))
        .order_by(*order)
        .limit(limit)
    )
    rows = await connection.execute(statement)
    return [Loose(digest=row.digest, since_us=row.since_us) for row in rows]


async def note_loose(connection: AsyncConnection, digests: Iterable[str]) -> None:
    """Note that blobs are loose from now on."""
    rows = [{"digest": digest, "since_us": _now_us()} for digest in digests]
    if rows:
        statement = dialect.insert(loose_blobs)
        again = statement.on_conflict_do_update(
            index_elements=["digest"], set_={"since_us": statement.excluded.since_us}
        )
        await connection.execute(again, rows)


async def note_strays(connection: AsyncConnection, digests: Sequence[str], since_us: int) -> None:
    """Note that blobs that no row names count as loose from a time on, which may come; those that are noted stay so."""
    rows = [{"digest": digest, "since_us": since_us} for digest in digests]
    await connection.execute(dialect.insert(loose_blobs).on_conflict_do_nothing(), rows)


async def forget_loose(connection: AsyncConnection, digests: Sequence[str]) -> None:
    """Forget loose blobs: they are gone, or needed again."""
    await connection.execute(delete(loose_blobs).where(loose_blobs.c.digest.in_(digests)))


async def _drop(connection: AsyncConnection, which: ColumnElement[bool]) -> int:
    statement = delete(blob_refs).where(which).returning(blob_refs.c.digest)
    dropped = (await connection.execute(statement)).scalars().all()
    for some in _in_parts(sorted(set(dropped))):
        still = await needed(connection, some)
        await note_loose(connection, (digest for digest in some if digest not in still))
    return len(dropped)


def _in_parts(digests: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(digests), dialect.MAX_VALUES):
        yield digests[first : first + dialect.MAX_VALUES]


def _now_us() -> int:
    return time.time_ns() // 1000
