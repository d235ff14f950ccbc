"""Refer to the blobs that evaluations, their shares and what workers kept of them name."""

from alembic import op

from luthier.storage.ref_rows import named_files, parts, refer, refer_family
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, ShareRow

revision = "evaluation_0009"
down_revision = "evaluation_0008"
branch_labels = None
depends_on = ("work_0012",)


def upgrade() -> None:
    """Write a row for each."""
    refer_family("evaluations", EvaluationPrivate)
    for uid, digest in parts("evaluations", "answer_files", "owner", "sha256"):
        refer(f"{uid}/answers", [digest])
    for uid, share in parts("evaluations", "shares", "owner", "share"):
        refer(f"{uid}/shares", named_files(ShareRow.FromString(share)))


def downgrade() -> None:
    """Forget them."""
    op.execute("DELETE FROM blob_refs")
