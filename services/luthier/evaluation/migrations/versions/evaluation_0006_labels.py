"""Key labels by the uid of their resource, and index what is deleted by name."""

from luthier.storage.label_rows import index_deleted, key_labels_by_uid

revision = "evaluation_0006"
down_revision = "evaluation_0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Move every row."""
    key_labels_by_uid("evaluations")
    index_deleted("evaluations")


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")
