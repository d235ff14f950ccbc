"""What the CPU faces of the operators share: which tensors they take, and how these are handed to C++."""

import functools
import importlib.util
from typing import TypedDict

import torch
from torch import Tensor

from luthier.kernels.dispatch import current_isa
from luthier.kernels.tables import Impl, kernels_of


class Settings(TypedDict):
    """Keyword arguments that every kernel has."""

    isa: str
    num_threads: int


DTYPES = (torch.bfloat16, torch.float32)


def refusal(impl: Impl, *tensors: Tensor) -> str | None:
    """Why the kernels that `impl` would run cannot take these tensors: device, dtype; None if they can.

    Raises:
        ValueError: `impl` is unknown.
    """
    if kernels_of(impl, tensors[0]) == "triton":
        if not _has_triton():
            return "impl 'triton' needs the package triton, which is not installed"
        from luthier.kernels import gpu

        return gpu.refusal(*tensors)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"impl 'cpu' needs tensors on the CPU, got {tensor.device}"
    if tensors[0].dtype not in DTYPES:
        return f"impl 'cpu' needs bfloat16 or float32, got {tensors[0].dtype}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def no_triton(op: str, impl: Impl, x: Tensor) -> str | None:
    """Why an operator without Triton kernels cannot run for `impl`, where it would take them."""
    return f"impl 'triton' is not there for {op}" if kernels_of(impl, x) == "triton" else None


def require_same(**tensors: Tensor) -> None:
    """Check that floating-point tensors share device and dtype.

    Raises:
        ValueError: they do not; the message gives each.
    """
    first, *others = tensors.values()
    # Each look at a tensor takes its time, and operators are called by the thousand.
    device, dtype = first.device, first.dtype
    if dtype.is_floating_point and all(one.dtype == dtype and one.device == device for one in others):
        return
    given = ", ".join(f"{name} {one.dtype} on {one.device}" for name, one in tensors.items())
    raise ValueError(f"tensors must share a float dtype and a device, got {given}")


def rows_of(x: Tensor) -> Tensor:
    """A 2-D tensor whose rows are contiguous and rise in memory; copied if it is not so."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def heads_of(x: Tensor) -> Tensor:
    """A 3-D tensor [T, H, D] whose last dimension is contiguous; copied if it is not."""
    return x if x.stride(2) == 1 and min(x.stride()) >= 0 else x.contiguous()


def row_pointer(x: Tensor | None) -> tuple[int, int]:
    """(address, row stride) of a 2-D tensor; (0, 0) of none."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def head_pointer(x: Tensor) -> tuple[int, int, int]:
    """(address, token stride, head stride) of a tensor [T, H, D]."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def settings() -> Settings:
    """How a kernel is to run now, as its keyword arguments: the instruction set, and torch's number of threads."""
    return {"isa": current_isa(), "num_threads": torch.get_num_threads()}
