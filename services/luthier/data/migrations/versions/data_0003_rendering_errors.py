"""Create the table of records that renderings could not render."""

import sqlalchemy as sa
from alembic import op

revision = "data_0003"
down_revision = "data_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "rendering_errors",
        sa.Column("rendering", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("filename", sa.String, nullable=False),
        sa.Column("line", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("message", sa.String, nullable=False),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("rendering_errors")
