"""Create the deliveries of webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "work_0011"
down_revision = "work_0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "deliveries",
        sa.Column("delivery_id", sa.String, primary_key=True),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("event_type", sa.String, nullable=False),
        sa.Column("url", sa.String, nullable=False),
        sa.Column("project", sa.String, nullable=False),
        sa.Column("host", sa.String, nullable=False),
        sa.Column("origin", sa.String, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("not_before_us", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("last_attempt_at_us", sa.BigInteger, nullable=False),
        sa.Column("last_status_code", sa.Integer, nullable=False),
        sa.Column("last_error", sa.String, nullable=False),
        sa.Column("ended_at_us", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("uid", "number", name="uq_deliveries_uid_number"),
    )
    op.create_index(
        "ix_deliveries_due",
        "deliveries",
        ["state", "host", "origin", "project", "attempts", "not_before_us"],
    )
    op.create_index("ix_deliveries_created", "deliveries", ["state", "created_at_us"])
    op.create_index("ix_deliveries_ended", "deliveries", ["state", "ended_at_us"])


def downgrade() -> None:
    """Drop it: what is yet to be told is told no more."""
    op.drop_table("deliveries")
