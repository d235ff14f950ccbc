"""Keep aliases of models, and their moves."""

import sqlalchemy as sa
from alembic import op

revision = "evaluation_0008"
down_revision = "evaluation_0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "model_aliases",
        sa.Column("uid", sa.String, primary_key=True),
        *(sa.Column(name, sa.String, nullable=False) for name in ("name", "parent", "state")),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("create_time_us", "update_time_us")),
        sa.Column("delete_time_us", sa.BigInteger),
        sa.Column("revision", sa.Integer, nullable=False),
        *(sa.Column(name, sa.LargeBinary, nullable=False) for name in ("message", "progress", "private")),
    )
    live, gone = sa.text("delete_time_us IS NULL"), sa.text("delete_time_us IS NOT NULL")
    op.create_index("ix_model_aliases_name", "model_aliases", ["name"], unique=True, sqlite_where=live)
    page = ["parent", "create_time_us", "name"]
    op.create_index("ix_model_aliases_page", "model_aliases", page, sqlite_where=live)
    op.create_index("ix_model_aliases_deleted", "model_aliases", ["name", "revision"], sqlite_where=gone)
    op.create_table(
        "model_aliases_labels",
        *(sa.Column(column, sa.String, primary_key=True) for column in ("parent", "key", "value")),
        sa.Column("create_time_us", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("uid", sa.String, primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_model_aliases_labels_uid", "model_aliases_labels", ["uid"])
    op.create_table(
        "alias_moves",
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("move", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("alias_moves")
    op.drop_table("model_aliases_labels")
    op.drop_table("model_aliases")
