"""Key tasks and events by uid; say of jobs and models what they were made from, and what they still need."""

from luthier.storage.uid_rows import hold, key_by_uid, messages, need_elsewhere, write
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
    of_jobs = messages("fine_tuning_jobs", (FineTuningJob, FineTuningJobPrivate))
    jobs = {job.name: (job.uid, job.rendering) for job, _ in of_jobs}
    models = _uids_and_digests_of_models()
    for model, _ in messages("models", (Model, ModelPrivate)):
        if model.kind != Model.KIND_ADAPTER:
            continue
        base, digest = models.get(model.base_model, ("", ""))
        model.references.add(name=model.base_model, uid=base, digest=digest)
        job, rendering = jobs.get(model.fine_tuning_job, ("", ""))
        model.references.add(name=model.fine_tuning_job, uid=job)
        if model.taught.rendering:
            model.references.add(name=model.taught.rendering, digest=model.taught.rendering_digest)
        hold(base, model.uid, model.name, lasting=True)
        if rendering and not model.HasField("taught"):  # only its job's rendering says how it is asked
            hold(job, model.uid, model.name, lasting=True)
            need_elsewhere([rendering], model.uid, model.name)
        write("models", model)


def _say_of_jobs() -> None:
    models = _uids_and_digests_of_models()
    for job, private in messages("fine_tuning_jobs", (FineTuningJob, FineTuningJobPrivate)):
        base, _ = models.get(job.base_model, ("", ""))
        job.references.add(name=job.base_model, uid=base, digest=private.base_model_digest)
        job.references.add(name=job.rendering, digest=private.rendering_digest)
        if job.tuned_model:
            tuned, digest = models.get(job.tuned_model, ("", ""))
            job.references.add(name=job.tuned_model, uid=tuned, digest=digest)
        if job.state in _UNFINISHED:
            hold(base, job.uid, job.name, lasting=False)
            need_elsewhere([job.rendering], job.uid, job.name)
        write("fine_tuning_jobs", job)


def _uids_and_digests_of_models() -> dict[str, tuple[str, str]]:
    of_models = messages("models", (Model, ModelPrivate))
    return {model.name: (model.uid, model.digest) for model, _ in of_models}
