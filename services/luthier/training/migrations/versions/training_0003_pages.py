"""Index resources in the order of their pages, and give labels rows of their own."""

import sqlalchemy as sa
from alembic import op

revision = "training_0003"
down_revision = "training_0002"
branch_labels = None
depends_on = None

_FAMILIES: dict[str, tuple[str, ...]] = {
    "models": ("state", "kind", "base_model", "fine_tuning_job"),
    "fine_tuning_jobs": ("state", "base_model", "rendering"),
}
"""The columns that each is filtered by."""


def upgrade() -> None:
    """Create the indexes and the rows of the labels that are there."""
    for family, filters in _FAMILIES.items():
        op.drop_index(f"ix_{family}_parent", family)
        op.create_index(f"ix_{family}_page", family, ["parent", "create_time_us", "name"])
        for column in filters:
            op.create_index(f"ix_{family}_{column}", family, ["parent", column, "create_time_us", "name"])
        _create_labels(family)


def _create_labels(family: str) -> None:
    op.create_table(
        f"{family}_labels",
        sa.Column("parent", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("create_time_us", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String, primary_key=True),
        sqlite_with_rowid=False,
    )
    op.create_index(f"ix_{family}_labels_name", f"{family}_labels", ["name"])
    op.execute(
        f"INSERT INTO {family}_labels (parent, key, value, create_time_us, name) "
        f"SELECT {family}.parent, json_each.key, json_each.value, {family}.create_time_us, {family}.name "
        f"FROM {family}, json_each({family}.labels)"
    )


def downgrade() -> None:
    """Drop them."""
    for family, filters in _FAMILIES.items():
        op.drop_table(f"{family}_labels")
        for column in filters:
            op.drop_index(f"ix_{family}_{column}", family)
        op.drop_index(f"ix_{family}_page", family)
        op.create_index(f"ix_{family}_parent", family, ["parent"])
