"""Remember what each step of a reinforcement job drew from its model."""

import sqlalchemy as sa
from alembic import op

revision = "training_0007"
down_revision = "training_0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "rollouts",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("num_rollouts", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_rollouts_digest", "rollouts", ["digest"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("rollouts")
