"""Let a claim be repeated, a task be put off, and finished tasks and old answers be found by age."""

import sqlalchemy as sa
from alembic import op

revision = "work_0003"
down_revision = "work_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; tasks that ended before this are taken to have ended when they were last queued."""
    op.add_column("tasks", sa.Column("claim", sa.String, nullable=False, server_default=""))
    for name in ("not_before_us", "ended_at_us"):
        op.add_column("tasks", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("delays", sa.Integer, nullable=False, server_default="0"))
    op.execute("UPDATE tasks SET ended_at_us = queued_at_us WHERE state = 'DONE'")
    op.create_index("ix_tasks_state_ended", "tasks", ["state", "ended_at_us"])
    op.create_index("ix_request_log_created", "request_log", ["created_at_us"])


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_request_log_created", "request_log")
    op.drop_index("ix_tasks_state_ended", "tasks")
    for name in ("delays", "ended_at_us", "not_before_us", "claim"):
        op.drop_column("tasks", name)
