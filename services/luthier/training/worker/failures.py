"""What torch raises where there is too little memory, or where a GPU fails, by names that a program can switch on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.training.fitting import Fit
from luthier.training.worker.order import out_of_memory
from luthier.v1 import fine_tuning_job_pb2

_WITHOUT_MEMORY = re.compile(
    # torch 2.13's allocator for the processor; a GPU's driver and its library of products for what they need.
    "can't allocate memory|(?:CUDA|HIP) error: out of memory|(?:CU|HIP)BLAS_STATUS_ALLOC_FAILED"
)
_FAILED_DEVICE = re.compile(r"\b(?:CUDA|HIP|cuBLAS|NVML) (?:driver )?error\b|(?:CU|HIP)BLAS_STATUS_")


def is_for_memory(error: Exception) -> bool:
    """Whether torch, or the interpreter, raised an error for want of memory."""
    is_full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_full or _WITHOUT_MEMORY.search(str(error)) is not None


@contextmanager
def named_errors(
    job: fine_tuning_job_pb2.FineTuningJob, device: torch.device, chosen: Sequence[Fit]
) -> Iterator[None]:
    """Turn what torch raises for want of memory into OUT_OF_MEMORY with a hint, and a GPU's failure into CRASHED.

    The last of `chosen` is what the passes are, and were expected to take.
    """
    try:
        yield
    except LuthierError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if is_for_memory(error):
            tokens = chosen[-1].micro_batch_tokens if chosen else 0
            expected = chosen[-1].words if chosen else ""
            raise out_of_memory(job, text, tokens, expected) from error
        if device.type != "cpu" and _FAILED_DEVICE.search(text):
            raise Unavailable(
                f"the device {device} must work, it failed: {' '.join(text.split())[:500]}",
                reason=Reason.CRASHED,
            ) from error
        raise
