"""Keep what a task requires of its worker, and what is said while no such worker is there."""

import sqlalchemy as sa
from alembic import op

revision = "work_0006"
down_revision = "work_0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; tasks of before this require nothing."""
    op.add_column("tasks", sa.Column("required_device", sa.String, nullable=False, server_default=""))
    op.add_column(
        "tasks", sa.Column("required_memory_bytes", sa.BigInteger, nullable=False, server_default="0")
    )
    op.add_column("tasks", sa.Column("said", sa.String, nullable=False, server_default=""))
    op.add_column("tasks", sa.Column("told", sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Drop them."""
    for column in ("told", "said", "required_memory_bytes", "required_device"):
        op.drop_column("tasks", column)
