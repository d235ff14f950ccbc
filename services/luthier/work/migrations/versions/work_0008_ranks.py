"""Keep how many ranks a task requires of its worker."""

import sqlalchemy as sa
from alembic import op

revision = "work_0008"
down_revision = "work_0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; tasks of before this require none, and a worker that has too few gives them back."""
    op.add_column("tasks", sa.Column("required_ranks", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("tasks", "required_ranks")
