"""The weights that a job trains: an adapter or all of a model's, begun anew or gone on with."""

from __future__ import annotations

from transformers import PreTrainedModel

from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.recipes.weights import Adapter, AllWeights, Weights
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.work.context import TaskContext

ADAPTER = "default"
"""Name of the adapter within the model; PEFT's own default."""


def weights_of(context: TaskContext, model: PreTrainedModel) -> Weights:
    """Return the weights of a task's job, bound to its base model, as they are before the first step.

    A task that resumes begins with those of its checkpoint: what the job began from is not fetched again.

    Raises:
        InvalidArgument: a target matches no linear layer.
        DataLoss: what the job begins from does not fit the model.
    """
    spec = context.task.train
    weights = _new(spec.job, model)
    if spec.start_files and not spec.checkpoint_files:
        folder = context.scratch / "start"
        for file in spec.start_files:
            if file.path in weights.files:
                context.fetch_into(folder, file)
        weights.load(folder)
        context.log(f"begins from {spec.job.start_from}")
    return weights


def _new(job: FineTuningJob, model: PreTrainedModel) -> Weights:
    if job.HasField("full"):
        return AllWeights(model)
    spec = LoraSpec(
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        targets=tuple(job.lora.target_modules) or "all-linear",
        use_rslora=job.lora.use_rslora,
    )
    insert_lora(model, spec, seed=job.hyperparameters.seed, name=ADAPTER)
    return Adapter(model, ADAPTER, base_model=job.base_model)
