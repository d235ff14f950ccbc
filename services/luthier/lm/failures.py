"""What torch raises where there is too little memory, or where a GPU fails."""

from __future__ import annotations

import re

import torch

_WITHOUT_MEMORY = re.compile(
    # torch 2.13's allocator for the processor; a GPU's driver and its library of products for what they need.
    "can't allocate memory|(?:CUDA|HIP) error: out of memory|(?:CU|HIP)BLAS_STATUS_ALLOC_FAILED"
)
_FAILED_DEVICE = re.compile(r"\b(?:CUDA|HIP|cuBLAS|NVML) (?:driver )?error\b|(?:CU|HIP)BLAS_STATUS_")


def is_for_memory(error: Exception) -> bool:
    """Whether torch, or the interpreter, raised an error for want of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _WITHOUT_MEMORY.search(str(error)) is not None


def is_of_device(error: Exception, device: torch.device) -> bool:
    """Whether an error says that a GPU failed: a process may be unable to use it from then on."""
    if device.type == "cpu" or not isinstance(error, RuntimeError) or is_for_memory(error):
        return False
    return _FAILED_DEVICE.search(str(error)) is not None


def device_failed(error: Exception, device: torch.device) -> str:
    """Return the words for a GPU that failed."""
    return f"the device {device} must work, it failed: {' '.join(str(error).split())[:500]}"
