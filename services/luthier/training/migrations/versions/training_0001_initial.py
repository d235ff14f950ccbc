"""Create models, jobs, checkpoints and metric points."""

import sqlalchemy as sa
from alembic import op

revision = "training_0001"
down_revision = None
branch_labels = ("training",)
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    _create_resources()
    _create_history()


def _create_resources() -> None:
    op.create_table(
        "models",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("parent", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("update_time_us", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("fine_tuning_job", sa.String, nullable=False),
    )
    op.create_index("ix_models_parent", "models", ["parent"])
    op.create_table(
        "fine_tuning_jobs",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("parent", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("update_time_us", sa.BigInteger, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("rendering", sa.String, nullable=False),
    )
    op.create_index("ix_fine_tuning_jobs_parent", "fine_tuning_jobs", ["parent"])


def _create_history() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("uid", sa.String, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_checkpoints_name", "checkpoints", ["name"], unique=True)
    op.create_table(
        "metric_points",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("metric_values", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("metric_points", "checkpoints", "fine_tuning_jobs", "models"):
        op.drop_table(table)
