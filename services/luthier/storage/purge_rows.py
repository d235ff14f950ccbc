"""Until when what is deleted can be brought back: what the migrations of each service share.

What stands here is as it was on the day of those migrations, and never changes again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op


def add_purge_times(*families: str) -> None:
    """Give the tables of these families a purge time, and indexes of what is deleted: by it, and for pages."""
    gone = sa.text("delete_time_us IS NOT NULL")
    for family in families:
        op.add_column(family, sa.Column("purge_time_us", sa.BigInteger))
        op.create_index(f"ix_{family}_purge", family, ["purge_time_us"], sqlite_where=gone)
        op.create_index(f"ix_{family}_gone", family, ["parent", "create_time_us", "name"], sqlite_where=gone)


def drop_purge_times(*families: str) -> None:
    """Drop them."""
    for family in families:
        op.drop_index(f"ix_{family}_gone", family)
        op.drop_index(f"ix_{family}_purge", family)
        op.drop_column(family, "purge_time_us")
