"""Key tasks and events by uid; say of jobs and models what they were made from, and what they still need."""

from luthier.storage.uid_rows import hold, key_by_uid, messages, need_elsewhere, uids, write
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate, ModelPrivate
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model

revision = "training_0005"
down_revision = "training_0004"
branch_labels = None
depends_on = ("work_0005",)

_UNFINISHED = (
    FineTuningJob.STATE_QUEUED,
    FineTuningJob.STATE_PREPARING,
    FineTuningJob.STATE_RUNNING,
    FineTuningJob.STATE_CANCELLING,
)


def upgrade() -> None:
    """Change every row."""
    key_by_uid("models", "fine_tuning_jobs")
    _say_of_models()
    _say_of_jobs()


def downgrade() -> None:
    """Refuse: names that were used again since cannot be keys."""
    raise NotImplementedError("rows by uid cannot become rows by name again; restore a backup")


def _say_of_models() -> None:
    jobs = uids("fine_tuning_jobs")
    of_models = messages("models", (Model, ModelPrivate))
    models = {model.name: (model.uid, model.digest) for model, _ in of_models}
    for model, _ in messages("models", (Model, ModelPrivate)):
        if model.kind != Model.KIND_ADAPTER:
            continue
        base, digest = models.get(model.base_model, ("", ""))
        model.references.add(name=model.base_model, uid=base, digest=digest)
        model.references.add(name=model.fine_tuning_job, uid=jobs.get(model.fine_tuning_job, ""))
        hold(base, model.uid, model.name, lasting=True)
        write("models", model)


def _say_of_jobs() -> None:
    models = uids("models")
    for job, private in messages("fine_tuning_jobs", (FineTuningJob, FineTuningJobPrivate)):
        base = models.get(job.base_model, "")
        job.references.add(name=job.base_model, uid=base, digest=private.base_model_digest)
        job.references.add(name=job.rendering, digest=private.rendering_digest)
        if job.state in _UNFINISHED:
            hold(base, job.uid, job.name, lasting=False)
            need_elsewhere([job.rendering], job.uid, job.name)
        write("fine_tuning_jobs", job)
