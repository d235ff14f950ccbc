"""Labels keyed by uid, and names of what is deleted: what the migrations of each service share.

What stands here is as it was on the day of those migrations, and never changes again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op


def key_labels_by_uid(*families: str) -> None:
    """Give the labels of these families the uid of the resource that has the name, which is not deleted."""
    for family in families:
        table, former = f"{family}_labels", f"{family}_labels_by_name"
        op.drop_index(f"ix_{table}_name", table)
        op.rename_table(table, former)
        op.create_table(
            table,
            *(sa.Column(column, sa.String, primary_key=True) for column in ("parent", "key", "value")),
            sa.Column("create_time_us", sa.BigInteger, primary_key=True, autoincrement=False),
            sa.Column("name", sa.String, primary_key=True),
            sa.Column("uid", sa.String, primary_key=True),
            sqlite_with_rowid=False,
        )
        op.execute(
            f"INSERT INTO {table} (parent, key, value, create_time_us, name, uid) "
            f"SELECT old.parent, old.key, old.value, old.create_time_us, old.name, {family}.uid "
            f"FROM {former} AS old JOIN {family} "
            f"ON {family}.name = old.name AND {family}.delete_time_us IS NULL"
        )
        op.create_index(f"ix_{table}_uid", table, ["uid"])
        op.drop_table(former)


def index_deleted(*families: str) -> None:
    """Make the last revision that a deleted resource of a name had be found by that name."""
    for family in families:
        gone = sa.text("delete_time_us IS NOT NULL")
        op.create_index(f"ix_{family}_deleted", family, ["name", "revision"], sqlite_where=gone)
