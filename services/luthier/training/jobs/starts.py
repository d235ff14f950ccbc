"""What training begins from: a tuned adapter, a model with all its weights, or a checkpoint of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    Reason,
)
from luthier.runtime.field_limits import refuse
from luthier.storage.blobs import BlobStore
from luthier.storage.pages import parent_of
from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.jobs import repository
from luthier.training.jobs.base_models import Models
from luthier.training.jobs.precision import precision_violations
from luthier.training.names import is_checkpoint
from luthier.training.recipe_settings import is_divided
from luthier.training.weights import StoredModel, weight_files
from luthier.v1.base_precision_pb2 import BASE_PRECISION_UNSPECIFIED, BasePrecision
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, LoraConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.work.families import Family, referred
from luthier.worker.v1.task_pb2 import BlobFile

ADAPTER_CONFIG = "adapter_config.json"
"""How PEFT calls what says an adapter's rank and targets: a start that has it is one."""
_MAX_CONFIG_BYTES = 1 << 20
_OF_TRAINING = frozenset({"dropout", "lora_plus_ratio"})
"""Settings of an adapter that say how it is trained, not what it is: a job that goes on with it has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a job begins from.

    Attributes:
        reference: it, as it is now.
        base: the model with all the weights that it is, or that it is of.
        files: those of an adapter or a checkpoint; empty for a model with all its weights.
        base_precision: what the base of an adapter was held in while it was trained.
    """

    reference: Reference
    base: Reference
    files: Sequence[BlobFile]
    base_precision: BasePrecision.ValueType = BASE_PRECISION_UNSPECIFIED

    @property
    def adapter_config(self) -> BlobFile | None:
        """The file that says an adapter's rank and targets; None where it is no adapter."""
        return next((file for file in self.files if file.path == ADAPTER_CONFIG), None)


class Starts:
    """Finds what jobs begin from."""

    def __init__(
        self, models: Models, jobs: Family[FineTuningJob, FineTuningJobPrivate], blobs: BlobStore
    ) -> None:
        self._models = models
        self._jobs = jobs
        self._blobs = blobs
        self._checkpoints = repository.Checkpoints()

    async def find(self, connection: AsyncConnection, name: str) -> Start:
        """Return a start by its name.

        Raises NotFound, InvalidArgument for a reward model, FailedPrecondition WRONG_STATE for one that is not READY.
        """
        if is_checkpoint(name):
            return await self._checkpoint(connection, name)
        model = await self._models.find_ready(connection, name)
        reference = Reference(name=name, uid=model.uid, digest=model.message.digest)
        if model.message.kind == Model.KIND_REWARD:
            raise _refused("start_from", f"must be a model of words, got {name!r}, a reward model")
        if model.message.kind == Model.KIND_EXPORT:
            made_from = model.message.start_from
            what = f"a file for other programs; it was made from {made_from}"
            raise _refused("start_from", f"must be a model of words, got {name!r}, {what}")
        if model.message.kind != Model.KIND_ADAPTER:
            return Start(reference=reference, base=reference, files=())
        return Start(
            reference=reference,
            base=referred(model.message, model.message.base_model),
            files=weight_files(model),
            base_precision=model.message.base_precision,
        )

    async def require(self, connection: AsyncConnection, start: Start) -> None:
        """Raise Aborted unless a start is still what it was: it may have been deleted, or a checkpoint dropped."""
        try:
            found = await self.find(connection, start.reference.name)
        except NotFound:
            found = None
        if found is None or found.reference != start.reference:
            name = start.reference.name
            raise Aborted(f"{name} was deleted or changed meanwhile; call again", metadata={"name": name})

    async def begun(self, wanted: FineTuningJob, start: Start) -> FineTuningJob:
        """Return a job with what its start decides: the base model, and what is trained.

        Raises:
            InvalidArgument: the job says another base model, rank or target than its start has.
            DataLoss: the start's files are not what was stored.
        """
        job = FineTuningJob()
        job.CopyFrom(wanted)
        if wanted.base_model and wanted.base_model != start.base.name:
            raise _refused(
                "base_model",
                f"must be {start.base.name}, the base model of {start.reference.name}, or unset; got "
                f"{wanted.base_model!r}",
            )
        job.base_model = start.base.name
        if start.files:
            self._require_same_adaptation(wanted, start)
            if start.adapter_config is None:
                job.full.SetInParent()
                refuse(precision_violations(job))
            else:
                lora = await self._lora(start.adapter_config)
                if wanted.HasField("reward_model") and "lm_head" in lora.trained_modules:
                    raise _refused(
                        "start_from",
                        f"must be an adapter that trains no lm_head: a reward model has none, and "
                        f"{start.reference.name} brings one",
                    )
                if is_divided(wanted) and lora.trained_modules:
                    raise _refused(
                        "start_from",
                        f"must be an adapter that trains no module whole with sharding SHARDING_FSDP2, "
                        f"{start.reference.name} trains {list(lora.trained_modules)}",
                    )
                job.lora.CopyFrom(_same_lora(wanted, lora))
                job.base_precision = wanted.base_precision or start.base_precision
        return job

    def _require_same_adaptation(self, wanted: FineTuningJob, start: Start) -> None:
        chosen, name = wanted.WhichOneof("adaptation"), start.reference.name
        if start.adapter_config is None and chosen == "lora":
            raise _refused("lora", f"must be unset: {name} holds all weights, train them on by full")
        if start.adapter_config is None and wanted.HasField("reward_model"):
            raise _refused(
                "start_from",
                f"must be a model: {name} is a checkpoint of all weights, and a reward model has other ones",
            )
        if start.adapter_config is not None and chosen == "full":
            raise _refused(
                "full", f"must be unset: {name} is an adapter; all weights start from a model that has them"
            )

    async def _checkpoint(self, connection: AsyncConnection, name: str) -> Start:
        checkpoint = await self._checkpoints.get(connection, name)
        job = await self._jobs.get(connection, parent_of(name))
        message = checkpoint.message
        if job.message.HasField("reward_model"):
            raise _refused("start_from", f"must be of a model of words, got {name!r}, of a reward model")
        return Start(
            reference=Reference(name=name, uid=message.uid, digest=message.digest),
            base=_base_of(job),
            files=checkpoint.private.files,
            base_precision=job.message.base_precision,
        )

    async def _lora(self, file: BlobFile) -> LoraConfig:
        if file.size_bytes > _MAX_CONFIG_BYTES:
            raise DataLoss(f"{file.path} must have at most {_MAX_CONFIG_BYTES} bytes, got {file.size_bytes}")
        text = await self._blobs.read_bytes(file.sha256)
        try:
            found = msgspec.json.decode(text, type=_AdapterConfig)
        except msgspec.DecodeError as error:
            raise DataLoss(f"{file.path} of a stored adapter cannot be read: {error}") from error
        return LoraConfig(
            rank=found.r,
            alpha=found.lora_alpha,
            target_modules=found.target_modules,
            use_rslora=found.use_rslora,
            use_dora=found.use_dora,
            rank_pattern=found.rank_pattern,
            alpha_pattern=found.alpha_pattern,
            trained_modules=found.modules_to_save or (),
        )


class _AdapterConfig(msgspec.Struct):
    r: int
    lora_alpha: float
    target_modules: list[str]
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, float] = msgspec.field(default_factory=dict)
    modules_to_save: list[str] | None = None


def require_base(start: Start, base: StoredModel) -> None:
    """Raise FailedPrecondition unless a base model is the one that a start was made on."""
    if base.uid != start.base.uid:
        raise FailedPrecondition(
            f"{start.reference.name} was made on another model of the name {base.message.name}, which was deleted",
            reason=Reason.WRONG_STATE,
            metadata={"name": start.reference.name, "base_model": base.message.name},
        )


def _base_of(job: Stored[FineTuningJob, FineTuningJobPrivate]) -> Reference:
    return referred(job.message, job.message.base_model)


def _same_lora(wanted: FineTuningJob, start: LoraConfig) -> LoraConfig:
    """Return the adapter's settings, with what the job says of how it is trained.

    Raises InvalidArgument for another one that is said and differs.
    """
    refuse(
        FieldViolation(
            field=f"fine_tuning_job.lora.{field.name}",
            description=f"must be unset or what the adapter has that is gone on with, "
            f"{_shown(getattr(start, field.name))}; got {_shown(said)}",
        )
        for field, said in wanted.lora.ListFields()
        if field.name not in _OF_TRAINING and not _same(said, getattr(start, field.name))
    )
    start.dropout, start.lora_plus_ratio = wanted.lora.dropout, wanted.lora.lora_plus_ratio
    return start


def _same(said: Any, known: Any) -> bool:
    if isinstance(said, int | float):
        return bool(said == known)
    return dict(said) == dict(known) if isinstance(said, Mapping) else set(said) == set(known)


def _shown(value: Any) -> str:
    if isinstance(value, int | float):
        return str(value)
    return str(dict(sorted(value.items())) if isinstance(value, Mapping) else list(value))


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.of_fields(
        FieldViolation(field=f"fine_tuning_job.{field}", description=description)
    )
