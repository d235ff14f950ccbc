"""Let what is deleted go on holding what it needs, as long as it may come back."""

import sqlalchemy as sa
from alembic import op

revision = "work_0014"
down_revision = "work_0013"
branch_labels = None
depends_on = None

_NAMES = ("holder_deleted", "held_deleted")


def upgrade() -> None:
    """Add the columns: nothing that is deleted holds, or is held, so far."""
    for name in _NAMES:
        op.add_column("holds", sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Drop them, and the holds of what is deleted."""
    op.execute("DELETE FROM holds WHERE holder_deleted")
    with op.batch_alter_table("holds") as batch:
        for name in _NAMES:
            batch.drop_column(name)
