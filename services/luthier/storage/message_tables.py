"""Tables of resource families: what is searched or ordered by has a column, the rest is in the messages."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table

from luthier.storage.dialect import index_of
from luthier.storage.pages import FILTERS, LABELS, labels_table


def message_table(
    name: str, metadata: MetaData, *extra_columns: Column[Any], has_state: bool = True
) -> Table:
    """Return the table of a resource family. An extra column holds what `Rows` is told to write there, to filter by.

    Beside it stands the table `<name>_labels`, a row for each label of each resource that is not deleted.
    """
    filters = (*(("state",) if has_state else ()), *(column.name for column in extra_columns))
    table = Table(
        name,
        metadata,
        Column("uid", String, primary_key=True),
        Column("name", String, nullable=False),
        Column("parent", String, nullable=False),
        Column("state", String, nullable=False),
        Column("create_time_us", BigInteger, nullable=False),
        Column("update_time_us", BigInteger, nullable=False),
        Column("delete_time_us", BigInteger),
        Column("purge_time_us", BigInteger),
        Column("revision", Integer, nullable=False),
        Column("message", LargeBinary, nullable=False),
        Column("progress", LargeBinary, nullable=False),
        Column("private", LargeBinary, nullable=False),
        *extra_columns,
        info={LABELS: labels_table(name, metadata), FILTERS: filters},
    )
    live = index_of(table.c.delete_time_us.is_(None))
    Index(f"ix_{name}_name", table.c.name, unique=True, **live)
    Index(f"ix_{name}_page", table.c.parent, table.c.create_time_us, table.c.name, **live)
    gone = index_of(table.c.delete_time_us.is_not(None))
    Index(f"ix_{name}_deleted", table.c.name, table.c.revision, **gone)
    Index(f"ix_{name}_gone", table.c.parent, table.c.create_time_us, table.c.name, **gone)
    Index(f"ix_{name}_purge", table.c.purge_time_us, **gone)
    for column in filters:
        in_order = (table.c.parent, table.c[column], table.c.create_time_us, table.c.name)
        Index(f"ix_{name}_{column}", *in_order, **live)
    return table
