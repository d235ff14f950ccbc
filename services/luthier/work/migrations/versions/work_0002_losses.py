"""Count the lost attempts of a task since its last checkpoint."""

import sqlalchemy as sa
from alembic import op

revision = "work_0002"
down_revision = "work_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the count, 0 for tasks that are there."""
    op.add_column("tasks", sa.Column("losses", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop the count."""
    op.drop_column("tasks", "losses")
