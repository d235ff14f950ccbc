"""Remember which tasks were asked to pause."""

import sqlalchemy as sa
from alembic import op

revision = "work_0013"
down_revision = "work_0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column: of the tasks that are there none was asked."""
    op.add_column(
        "tasks", sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false())
    )


def downgrade() -> None:
    """Drop it: what is paused is queued again."""
    op.execute("UPDATE tasks SET state = 'QUEUED' WHERE state = 'PAUSED'")
    with op.batch_alter_table("tasks") as batch:
        batch.drop_column("pause_requested")
