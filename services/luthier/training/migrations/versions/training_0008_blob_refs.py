"""Refer to the blobs that models, jobs, checkpoints and rollouts name, and wait for those that were released."""

import hashlib
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

from luthier.storage.ref_rows import named_files, parts, refer, refer_family
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate, ModelPrivate

revision = "training_0008"
down_revision = "training_0007"
branch_labels = None
depends_on = ("work_0012",)


def upgrade() -> None:
    """Write a row for each."""
    refer_family("models", ModelPrivate)
    refer_family("fine_tuning_jobs", FineTuningJobPrivate, _of_job)
    for uid, step, private in parts("fine_tuning_jobs", "checkpoints", "job", "step", "private"):
        refer(f"{uid}/checkpoints/{step}", named_files(CheckpointPrivate.FromString(private)))
    for uid, step, digest in parts("fine_tuning_jobs", "rollouts", "job", "step", "digest"):
        refer(f"{uid}/rollouts/{step}", [digest])
    op.execute(
        "INSERT OR IGNORE INTO loose_blobs (digest, since_us) SELECT digest, release_time_us FROM released_blobs"
    )
    op.drop_table("released_blobs")
    op.drop_index("ix_rollouts_digest", "rollouts")


def downgrade() -> None:
    """Release what is loose, and forget the rest."""
    op.create_index("ix_rollouts_digest", "rollouts", ["digest"])
    op.create_table(
        "released_blobs",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("release_time_us", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO released_blobs (digest, release_time_us) SELECT digest, since_us FROM loose_blobs"
    )
    op.execute("DELETE FROM blob_refs")


def _of_job(private: FineTuningJobPrivate) -> Iterator[str]:
    yield from named_files(private)
    if private.taught.chat_template:
        yield hashlib.sha256(private.taught.chat_template.encode()).hexdigest()
