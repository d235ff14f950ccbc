"""Create the references to blobs, and what is loose of them; each service fills in what its resources name."""

import sqlalchemy as sa
from alembic import op

revision = "work_0012"
down_revision = "work_0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "blob_refs",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("digest", sa.String, primary_key=True),
    )
    op.create_index("ix_blob_refs_digest", "blob_refs", ["digest"])
    op.create_table(
        "loose_blobs",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("since_us", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_loose_blobs_since", "loose_blobs", ["since_us"])


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("loose_blobs")
    op.drop_table("blob_refs")
