"""Keep whose turn a task is apart from when it was queued: what closes some work has the turn of what began it."""

import sqlalchemy as sa
from alembic import op

revision = "work_0009"
down_revision = "work_0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; until now they were one."""
    op.add_column("tasks", sa.Column("turn_at_us", sa.BigInteger, nullable=False, server_default="0"))
    op.execute("UPDATE tasks SET turn_at_us = queued_at_us")


def downgrade() -> None:
    """Drop it."""
    op.drop_column("tasks", "turn_at_us")
