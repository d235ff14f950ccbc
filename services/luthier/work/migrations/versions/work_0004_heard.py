"""Remember whether the holder of a lease ever spoke of it, also while the service is away."""

import sqlalchemy as sa
from alembic import op

revision = "work_0004"
down_revision = "work_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; leases granted before this are taken to be known to their holders."""
    op.add_column("tasks", sa.Column("heard", sa.Boolean, nullable=False, server_default=sa.true()))


def downgrade() -> None:
    """Drop it."""
    op.drop_column("tasks", "heard")
