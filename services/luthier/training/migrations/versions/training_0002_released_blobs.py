"""Remember the blobs of dropped checkpoints until their bytes are given back."""

import sqlalchemy as sa
from alembic import op

revision = "training_0002"
down_revision = "training_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "released_blobs",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("release_time_us", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("released_blobs")
