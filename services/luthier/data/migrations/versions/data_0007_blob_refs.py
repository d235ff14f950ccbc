"""Refer to the blobs that versions, uploads and renderings name."""

from alembic import op

from luthier.storage.ref_rows import refer_family
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate, RenderingPrivate, UploadPrivate

revision = "data_0007"
down_revision = "data_0006"
branch_labels = None
depends_on = ("work_0012",)


def upgrade() -> None:
    """Write a row for each."""
    refer_family("dataset_versions", DatasetVersionPrivate)
    refer_family("uploads", UploadPrivate)
    refer_family("renderings", RenderingPrivate)


def downgrade() -> None:
    """Forget them."""
    op.execute("DELETE FROM blob_refs")
