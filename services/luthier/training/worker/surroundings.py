"""What exactly runs: versions, processor, threads, kernels."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from luthier.kernels import describe, table_digest
from luthier.kernels.dequantise import is_quantised
from luthier.training.recipes import checkpoint
from luthier.training.recipes.engine import optimiser_kernel
from luthier.training.worker.determinism import attention_of, best_effort_reason
from luthier.v1 import fine_tuning_job_pb2
from luthier.work.machine import processor_name
from luthier.worker.v1 import task_pb2


def kernel_choices(model: PreTrainedModel) -> dict[str, str]:
    """Return the implementation of each operator that a training step uses, by dtype and class of shapes.

    The keys are `operator/dtype/class`; `isa` is the instruction set that the C++ kernels run with, `attention` what
    the model's packed batches take on its device.
    """
    described = describe(_architecture(model))
    by_table = {name: chosen for name, chosen in described.items() if name == "isa" or "/bfloat16/" in name}
    return {**by_table, "attention": attention_of(model)}


def surroundings(model: PreTrainedModel, num_ranks: int = 1, *, is_divided: bool = False) -> dict[str, str]:
    """Return all that the bits of a run's results depend on besides its settings and data.

    One rank is not named, nor that each has all of the model, nor what quantises nothing: checkpoints of before do not.
    """
    ranks = {"num_ranks": str(num_ranks)} if num_ranks > 1 else {}
    if is_divided:
        ranks["sharding"] = "FSDP2"
    is_quantised_base = any(map(is_quantised, model.parameters()))
    quantiser = {"torchao_version": importlib.metadata.version("torchao")} if is_quantised_base else {}
    return {
        **ranks,
        **quantiser,
        "code_version": importlib.metadata.version("luthier"),
        "device": _device(model),
        "torch_version": torch.__version__,
        "transformers_version": importlib.metadata.version("transformers"),
        "num_threads": str(torch.get_num_threads()),
        "kernel_table_digest": table_digest(),
        "isa": describe()["isa"],
        "attention": attention_of(model),
        "optimiser_kernel": optimiser_kernel(model.device),
    }


def run_record(
    spec: task_pb2.TrainSpec,
    model: PreTrainedModel,
    used: Sequence[fine_tuning_job_pb2.RenderingUse] = (),
    *,
    changed: Sequence[str] = (),
    num_ranks: int = 1,
) -> fine_tuning_job_pb2.RunRecord:
    """Return the record of a run of this model that begins now.

    `used` is what its steps take of each rendering of a mixture, `changed` what is not as it was when the run began;
    threads are those of each rank.
    """
    around = surroundings(model)
    reason = _changed(changed) if changed else best_effort_reason(model, num_ranks)
    determinism = (
        fine_tuning_job_pb2.DETERMINISM_BEST_EFFORT if reason else fine_tuning_job_pb2.DETERMINISM_BITWISE
    )
    return fine_tuning_job_pb2.RunRecord(
        code_version=around["code_version"],
        base_model_digest=spec.base_model_digest,
        rendering_digest=spec.rendering_digest,
        device=around["device"],
        torch_version=around["torch_version"],
        num_threads=int(around["num_threads"]),
        kernel_table_digest=around["kernel_table_digest"],
        kernels=kernel_choices(model),
        determinism=determinism,
        best_effort_reason=reason,
        renderings=used,
        num_ranks=num_ranks,
        sharding=spec.job.sharding,
    )


def _changed(names: Sequence[str]) -> str:
    known = [name for name in names if name != checkpoint.CHANGED_EARLIER]
    return f"{', '.join(known) or 'something'} changed since the run began"


def _architecture(model: PreTrainedModel) -> str | None:
    """Of the GPU that the model is on; None: it is on none."""
    if model.device.type != "cuda":
        return None
    from luthier.kernels.gpu import architecture

    return architecture(model.device)


def _device(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)} ({_architecture(model)})"
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"
