"""Give the database an id: what it keeps outside of itself says by it whose it is."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "work_0015"
down_revision = "work_0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, and the one row of it."""
    table = op.create_table("database_identity", sa.Column("database_id", sa.String, primary_key=True))
    op.bulk_insert(table, [{"database_id": uuid.uuid4().hex}])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("database_identity")
