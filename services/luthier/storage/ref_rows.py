"""References to blobs out of the messages that hold them: what the migrations of each service share.

What stands here is as it was on the day of those migrations, and never changes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import Message

P = TypeVar("P", bound=Message)
_BATCH_ROWS = 500


def named_files(message: Message) -> Iterator[str]:
    """Yield the digest of every file that a message names, however deep: each is in a field that ends with sha256."""
    for field, value in message.ListFields():
        if field.name.endswith("sha256"):
            yield from value if field.is_repeated else (value,)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else (value,):
                yield from named_files(part)


def refer(owner: str, digests: Iterable[str]) -> None:
    """Have an owner refer to blobs."""
    rows = [{"owner": owner, "digest": digest} for digest in dict.fromkeys(digests)]
    if rows:
        statement = sa.text("INSERT OR IGNORE INTO blob_refs (owner, digest) VALUES (:owner, :digest)")
        op.get_bind().execute(statement, rows)


def refer_family(
    family: str, private_type: type[P], digests: Callable[[P], Iterable[str]] = named_files
) -> None:
    """Have each resource of a family that is not deleted refer to the blobs that it names."""
    after = ""
    while True:
        statement = sa.text(
            f"SELECT uid, private FROM {family} WHERE uid > :after AND delete_time_us IS NULL "
            f"ORDER BY uid LIMIT {_BATCH_ROWS}"
        )
        rows = op.get_bind().execute(statement, {"after": after}).all()
        for uid, private in rows:
            refer(uid, digests(private_type.FromString(private)))
        if len(rows) < _BATCH_ROWS:
            return
        after = rows[-1].uid


def parts(family: str, table: str, owner: str, *columns: str) -> Iterator[Any]:
    """Yield the uid of a resource that is not deleted and columns of a row that is part of it, for each such row.

    `owner`: the column of the table that holds the uid.
    """
    chosen = ", ".join(f"part.{column}" for column in columns)
    yield from op.get_bind().execute(
        sa.text(
            f"SELECT whole.uid, {chosen} FROM {table} AS part JOIN {family} AS whole "
            f"ON whole.uid = part.{owner} WHERE whole.delete_time_us IS NULL"
        )
    )
