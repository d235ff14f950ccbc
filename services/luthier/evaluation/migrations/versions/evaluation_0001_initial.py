"""Create evaluations and predictions."""

import sqlalchemy as sa
from alembic import op

revision = "evaluation_0001"
down_revision = None
branch_labels = ("evaluation",)
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "evaluations",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("parent", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("update_time_us", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
    )
    op.create_index("ix_evaluations_parent", "evaluations", ["parent"])
    op.create_table(
        "predictions",
        sa.Column("evaluation", sa.String, primary_key=True),
        sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("prediction", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("predictions")
    op.drop_table("evaluations")
