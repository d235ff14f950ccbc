"""Create tasks, events and the request log."""

import sqlalchemy as sa
from alembic import op

revision = "work_0001"
down_revision = None
branch_labels = ("work",)
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("subject", sa.String, nullable=False),
        sa.Column("project", sa.String, nullable=False),
        sa.Column("resources", sa.JSON, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker", sa.String, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("last_local_number", sa.BigInteger, nullable=False),
        sa.Column("queued_at_us", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("subject", name="uq_tasks_subject"),
    )
    op.create_index("ix_tasks_state_kind", "tasks", ["state", "kind", "queued_at_us"])
    op.create_table(
        "events",
        sa.Column("subject", sa.String, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("event_time_us", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
    )
    op.create_table(
        "request_log",
        sa.Column("principal", sa.String, primary_key=True),
        sa.Column("method", sa.String, primary_key=True),
        sa.Column("request_id", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("request_log", "events", "tasks"):
        op.drop_table(table)
