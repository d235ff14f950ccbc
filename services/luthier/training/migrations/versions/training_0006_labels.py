"""Key labels by uid, index what is deleted by name, and what jobs and models were made from by uid."""

from collections.abc import Iterable

import sqlalchemy as sa
from alembic import op

from luthier.storage.label_rows import index_deleted, key_labels_by_uid
from luthier.storage.uid_rows import messages
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate, ModelPrivate
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference

revision = "training_0006"
down_revision = "training_0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change every row."""
    key_labels_by_uid("models", "fine_tuning_jobs")
    index_deleted("models", "fine_tuning_jobs")
    _add_columns("models", "base_model_uid", "fine_tuning_job_uid")
    for model, _ in messages("models", (Model, ModelPrivate)):
        told = _told(model.references)
        found = {
            "base_model_uid": told.get(model.base_model, ""),
            "fine_tuning_job_uid": told.get(model.fine_tuning_job, ""),
        }
        _write("models", model.uid, found)
    _add_columns("fine_tuning_jobs", "base_model_uid", "rendering_uid")
    for job, _ in messages("fine_tuning_jobs", (FineTuningJob, FineTuningJobPrivate)):
        told = _told(job.references)
        found = {
            "base_model_uid": told.get(job.base_model, ""),
            "rendering_uid": told.get(job.rendering, ""),
        }
        _write("fine_tuning_jobs", job.uid, found)


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")


def _add_columns(family: str, *columns: str) -> None:
    for column in columns:
        op.add_column(family, sa.Column(column, sa.String, nullable=False, server_default=""))
        order = ["parent", column, "create_time_us", "name"]
        live = sa.text("delete_time_us IS NULL")
        op.create_index(f"ix_{family}_{column}", family, order, sqlite_where=live)


def _told(references: Iterable[Reference]) -> dict[str, str]:
    """Return what tells the resource of each name from others of it: its uid, or where that is not known its digest."""
    return {one.name: one.uid or one.digest for one in references}


def _write(family: str, uid: str, found: dict[str, str]) -> None:
    columns = ", ".join(f"{column} = :{column}" for column in found)
    op.get_bind().execute(sa.text(f"UPDATE {family} SET {columns} WHERE uid = :uid"), {**found, "uid": uid})
