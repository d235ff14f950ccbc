"""Keep the shares of evaluations that are dealt to several workers, and which share an answer is of."""

import sqlalchemy as sa
from alembic import op

revision = "evaluation_0007"
down_revision = "evaluation_0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; answers of before this are of the whole."""
    op.create_table(
        "shares",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("share", sa.LargeBinary, nullable=False),
    )
    op.rename_table("answer_files", "answer_files_of_the_whole")
    op.create_table(
        "answer_files",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("share", sa.Integer, primary_key=True, autoincrement=False, server_default="0"),
        sa.Column("step", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO answer_files (owner, step, position, path, sha256, size_bytes) "
        "SELECT owner, step, position, path, sha256, size_bytes FROM answer_files_of_the_whole"
    )
    op.drop_table("answer_files_of_the_whole")


def downgrade() -> None:
    """Refuse: answers of shares cannot become answers of the whole again."""
    raise NotImplementedError("answers of shares have no place in the former table; restore a backup")
