"""The model that a job makes, as far as the job knows it."""

from __future__ import annotations

from luthier.grading.asked import reward_model_graders
from luthier.storage.pages import parent_of
from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.recipe_settings import rendering_names
from luthier.training.weights import Origin
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.work.families import referred


def tuned_model(job: Stored[FineTuningJob, FineTuningJobPrivate], step: int) -> Model:
    """Return what a job's model is at a step: its kind, what it was made from, how it is taught."""
    message = job.message
    full = message.HasField("full")
    kind = Model.KIND_WEIGHTS if full else Model.KIND_ADAPTER
    tuned = Model(
        name=f"{parent_of(message.name)}/models/{message.tuned_model_id}",
        kind=Model.KIND_REWARD if message.HasField("reward_model") else kind,
        base_model="" if full else message.base_model,
        base_precision=message.base_precision,
        start_from=message.start_from or (message.base_model if full else ""),
        fine_tuning_job=message.name,
        step=step,
        taught=job.private.taught if job.private.HasField("taught") else None,
    )
    for name in dict.fromkeys(filter(None, (message.base_model, message.start_from))):
        tuned.references.add().CopyFrom(referred(message, name))
    tuned.references.add(name=message.name, uid=job.uid)
    judges = dict.fromkeys(one.model for _, one in reward_model_graders(message.reinforcement.grader))
    for name in (*rendering_names(message), *judges):
        tuned.references.add().CopyFrom(referred(message, name))
    return tuned


def origin_of(job: Stored[FineTuningJob, FineTuningJobPrivate]) -> Origin:
    """Return what the files of a job's model are made of besides those that its worker brings."""
    base = referred(job.message, job.message.base_model)
    private = job.private
    return Origin(
        base_uid=base.uid,
        has_own_template=private.has_own_template,
        generation_config=private.generation_config if private.HasField("generation_config") else None,
    )
