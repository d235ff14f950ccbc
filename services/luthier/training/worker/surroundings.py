"""What exactly runs: versions, processor, threads, kernels."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.kernels import describe, table_digest
from luthier.v1 import fine_tuning_job_pb2
from luthier.worker.v1 import task_pb2


def kernel_choices() -> dict[str, str]:
    """Return the implementation of each operator that a training step uses, by dtype and class of shapes.

    The keys are `operator/dtype/class`; `isa` is the instruction set that the C++ kernels run with.
    """
    return {name: chosen for name, chosen in describe().items() if name == "isa" or "/bfloat16/" in name}


def run_record(
    spec: task_pb2.TrainSpec, kernels: Mapping[str, str], *, bitwise: bool
) -> fine_tuning_job_pb2.RunRecord:
    """Return the record of a run that begins now."""
    determinism = (
        fine_tuning_job_pb2.DETERMINISM_BITWISE if bitwise else fine_tuning_job_pb2.DETERMINISM_BEST_EFFORT
    )
    return fine_tuning_job_pb2.RunRecord(
        code_version=importlib.metadata.version("luthier"),
        base_model_digest=spec.base_model_digest,
        rendering_digest=spec.rendering_digest,
        device=f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        torch_version=torch.__version__,
        num_threads=torch.get_num_threads(),
        kernel_table_digest=table_digest(),
        kernels=kernels,
        determinism=determinism,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
