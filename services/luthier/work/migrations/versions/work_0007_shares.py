"""Let several tasks work for a resource, each for a share of its work."""

import sqlalchemy as sa
from alembic import op

revision = "work_0007"
down_revision = "work_0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; tasks of before this are of the whole."""
    with op.batch_alter_table("tasks") as batch:
        batch.add_column(sa.Column("share", sa.Integer, nullable=False, server_default="0"))
        batch.drop_constraint("uq_tasks_uid", type_="unique")
        batch.create_unique_constraint("uq_tasks_uid_share", ["uid", "share"])


def downgrade() -> None:
    """Drop it: works as long as no resource has several tasks."""
    with op.batch_alter_table("tasks") as batch:
        batch.drop_constraint("uq_tasks_uid_share", type_="unique")
        batch.drop_column("share")
        batch.create_unique_constraint("uq_tasks_uid", ["uid"])
