"""Keep until when what is deleted can be brought back."""

from luthier.storage.purge_rows import add_purge_times, drop_purge_times

revision = "data_0008"
down_revision = "data_0007"
branch_labels = None
depends_on = None

_FAMILIES = ("datasets", "dataset_versions", "uploads", "renderings")


def upgrade() -> None:
    """Add the columns: what is deleted already cannot come back, and goes as long after its deletion as the rest."""
    add_purge_times(*_FAMILIES)


def downgrade() -> None:
    """Drop them: what is deleted stays for ever."""
    drop_purge_times(*_FAMILIES)
