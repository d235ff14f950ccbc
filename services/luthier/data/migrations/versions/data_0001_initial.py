"""Create datasets, versions and their errors, uploads and renderings."""

import sqlalchemy as sa
from alembic import op

revision = "data_0001"
down_revision = None
branch_labels = ("data",)
depends_on = None

_FAMILIES = ("datasets", "dataset_versions", "uploads", "renderings")


def upgrade() -> None:
    """Create the tables."""
    for family in _FAMILIES:
        op.create_table(
            family,
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
        op.create_index(f"ix_{family}_parent", family, ["parent"])
    op.create_table(
        "dataset_version_errors",
        sa.Column("version", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("filename", sa.String, nullable=False),
        sa.Column("line", sa.BigInteger, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("message", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_table(
        "staged_uploads",
        sa.Column("uid", sa.String, primary_key=True),
        sa.Column("upload", sa.String, nullable=False),
        sa.Column("finishing", sa.Boolean, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("staged_uploads")
    op.drop_table("dataset_version_errors")
    for family in reversed(_FAMILIES):
        op.drop_table(family)
