"""The weights that a job trains: an adapter or all of a model's, begun anew or gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.kernels.dequantise import is_quantised
from luthier.lm.adapter_files import load_adapter
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.recipes.divided_weights import DividedWeights
from luthier.training.recipes.shards import Division
from luthier.training.recipes.weights import Adapter, AllWeights, Weights, fresh_score
from luthier.training.worker.order import Desk
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.worker.v1 import task_pb2

ADAPTER = "default"
"""Name of the adapter within the model; PEFT's own default."""
REFERENCE = "reference"
"""Name of the adapter that it began as, where it is compared with that."""


def base_model_folder(desk: Desk) -> Path:
    """Return a folder with the files of a job's base model, fetched one by one."""
    files = desk.task.train.base_model_files
    folder = desk.scratch / "base"
    for number, file in enumerate(files):
        desk.check()
        desk.progress("loading model", number, len(files), "files")
        wanted = task_pb2.BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        desk.fetch_into(folder, wanted)
    return folder


def weights_of(
    desk: Desk, model: PreTrainedModel, *, is_compared: bool, division: Division | None = None
) -> Weights:
    """Return the weights of a task's job, bound to its base model, as they are before the first step.

    With a division the model is divided then.

    A task that resumes begins with those of its checkpoint: what the job began from is fetched again only where what
    is learnt is compared with it.

    Raises:
        InvalidArgument: a target matches no linear layer, a pattern no target (MODULE_PATTERN_INVALID), or the model
            has no such module to train whole (TRAINED_MODULE_INVALID), or one that is divided is to train one so
            (SHARDING_INVALID).
        FailedPrecondition: SHARDING_INVALID, the model cannot be divided, or is quantised.
        DataLoss: what the job begins from does not fit the model.
    """
    spec = desk.task.train
    if division is not None and any(map(is_quantised, model.parameters())):
        raise FailedPrecondition(
            "a base model that ranks divide must be held in BFLOAT16, this one is quantised, as that was which the "
            "adapter learnt beside that the job goes on with: say base_precision BASE_PRECISION_BFLOAT16, or sharding "
            "SHARDING_REPLICATED",
            reason=Reason.SHARDING_INVALID,
        )
    begins = bool(spec.start_files) and not spec.checkpoint_files
    folder = desk.scratch / "start"
    if spec.job.HasField("full"):
        weights = _all_weights(spec.job, model, division)
        # Answers that are drawn on the way cannot be scored before the first step, as other rows are.
        keeps_start = is_compared and spec.job.HasField("reinforcement")
        if begins or (keeps_start and spec.start_files):
            _fetch_start(desk, folder, weights.needs)
            weights.load(folder)
        if keeps_start:
            weights.keep_start()
        return weights
    _insert(spec.job, model)
    has_reference = bool(spec.start_files) and is_compared
    if begins or has_reference:
        _fetch_start(desk, folder, Adapter.needs)
    if has_reference:
        load_adapter(model, folder, REFERENCE)
    adapter = Adapter(
        model,
        ADAPTER,
        base_model=spec.job.base_model,
        reference=REFERENCE if has_reference else None,
        score=_score(spec.job, model, division),
        seed=spec.job.hyperparameters.seed,
        division=division,
    )
    if spec.job.lora.lora_plus_ratio:
        adapter.hasten(spec.job.lora.lora_plus_ratio)
    if begins:
        adapter.begin_from(folder)
    return adapter


def _all_weights(
    job: FineTuningJob, model: PreTrainedModel, division: Division | None
) -> AllWeights | DividedWeights:
    score = _score(job, model, division)
    if division is None:
        return AllWeights(model, score=score)
    return DividedWeights(model, division, score=score)


def _fetch_start(desk: Desk, folder: Path, needs: Callable[[str], bool]) -> None:
    spec = desk.task.train
    for file in spec.start_files:
        if needs(file.path):
            desk.fetch_into(folder, file)
    if not spec.checkpoint_files:
        desk.log(f"begins from {spec.job.start_from}")


def _insert(job: FineTuningJob, model: PreTrainedModel) -> None:
    spec = LoraSpec(
        rank=job.lora.rank,
        alpha=job.lora.alpha,
        targets=tuple(job.lora.target_modules) or "all-linear",
        use_rslora=job.lora.use_rslora,
        use_dora=job.lora.use_dora,
        dropout=job.lora.dropout,
        rank_pattern=tuple(sorted(job.lora.rank_pattern.items())),
        alpha_pattern=tuple(sorted(job.lora.alpha_pattern.items())),
        trained_modules=tuple(job.lora.trained_modules),
    )
    insert_lora(model, spec, seed=job.hyperparameters.seed, name=ADAPTER)


def _score(job: FineTuningJob, model: PreTrainedModel, division: Division | None) -> nn.Parameter | None:
    """Return the head of a reward model, None for a model of words."""
    if not job.HasField("reward_model"):
        return None
    device = model.device if division is None else division.device
    return fresh_score(model, job.hyperparameters.seed, device)
