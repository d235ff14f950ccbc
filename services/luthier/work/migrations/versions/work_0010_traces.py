"""Keep which trace asked for a task, and which span was its last attempt."""

import sqlalchemy as sa
from alembic import op

revision = "work_0010"
down_revision = "work_0009"
branch_labels = None
depends_on = None

_NAMES = ("traceparent", "attempt_traceparent")


def upgrade() -> None:
    """Add the columns; of what is queued already nobody knows."""
    for name in _NAMES:
        op.add_column("tasks", sa.Column(name, sa.String, nullable=False, server_default=""))


def downgrade() -> None:
    """Drop them."""
    for name in _NAMES:
        op.drop_column("tasks", name)
