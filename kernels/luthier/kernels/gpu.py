"""What the Triton faces of the operators share on the host: architectures and launch configurations."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.knobs import runtime
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The same for every chip, so that bits do not depend on it.
_PROGRAMS = 128
_MOST_SLICES = 8
# What `enqueue` has launched: the compiled kernel, its constants in order, and the launch, whose id so stays its own.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], "Launch"]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a kernel is launched: sizes of its tiles by name, warps of a program, stages of its loops."""

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        # Fusing of multiply and add is set, as its default changes between versions of Triton.
        fusion = {} if interpreted() else {"enable_fp_fusion": True}
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages, **fusion}


Launches = Mapping[str, Launch]
"""By architecture: sm_80, sm_90, sm_100, gfx942; `*` is any other. `float32`: for that type, on all of them."""


@functools.cache
def interpreted() -> bool:
    """Tell whether Triton runs kernels in its interpreter, on tensors in main memory; settled at its import."""
    return bool(runtime.interpret)


def enqueue(
    kernel: Any,
    grid: tuple[int, ...],
    operands: Sequence[Any],
    constants: Mapping[str, Any],
    launch: "Launch",
) -> None:
    """Launch a kernel on its first arguments, tensors, numbers and tensor descriptors, and by name its constants.

    Triton finds out at every launch which compiled kernel fits, in several times the time of the launch itself. Here
    it is kept by what it depends on: types and alignment of tensors, classes of numbers, the constants. `launch` must
    be an object that is kept: one made for each call would be remembered for ever.
    """
    if interpreted():
        kernel[grid](*operands, **constants, **launch.options)
        return
    device = next(one.device for one in operands if isinstance(one, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # A compiled kernel is loaded on the device that is current when it is first launched.
        with torch.cuda.device(device):
            enqueue(kernel, grid, operands, constants, launch)
        return
    key = (id(kernel), id(launch), device, *constants.values(), *map(_kind, operands))
    if found := _compiled.get(key):
        compiled, rest, _ = found
        compiled[(*grid, 1, 1)[:3]](*operands, *rest)
        return
    compiled = kernel[grid](*operands, **constants, **launch.options)
    given = {**launch.tiles, **constants}
    _compiled[key] = compiled, tuple(given[name] for name in kernel.arg_names[len(operands) :]), launch


def _kind(operand: Any) -> Any:
    """What Triton compiles a kernel for, of an operand: at most as much as tells two kernels apart."""
    kind = type(operand)
    if kind is int:
        # -2**31 takes as few bits as 2**31 - 1.
        bits = (operand if operand >= 0 else ~operand).bit_length()
        return operand == 1, operand % 16 == 0, bits // 32
    if isinstance(operand, Tensor):
        # AMD's kernels count in 32 bits where all of a tensor's memory allows it.
        is_short = torch.version.hip is None or operand.untyped_storage().nbytes() < 2**31
        return operand.dtype, operand.data_ptr() % 16 == 0, is_short
    if kind is TensorDescriptor:
        return operand.base.dtype, *operand.block_shape
    return kind


def gives_float32(x: Tensor) -> bool:
    """Tell whether the vendor library gives products of such tensors in float32 without rounding them before."""
    return x.dtype == torch.float32 or (x.device.type == "cuda" and torch.version.hip is None)


def product_float32(left: Tensor, right: Tensor) -> Tensor:
    """The vendor library's product in float32; rounded before where `gives_float32` says no."""
    if left.dtype == torch.float32:
        return left @ right
    if gives_float32(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def architecture(device: torch.device) -> str:
    """The name of a device's architecture as the launch tables have it."""
    return "*" if device.type != "cuda" else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "")
    return name.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def launch_for(table: Launches, x: Tensor) -> Launch:
    """The launch configuration for what x is and where it is."""
    if x.dtype == torch.float32 and "float32" in table:
        return table["float32"]
    return table.get(architecture(x.device), table["*"])


def refusal(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors: device or dtype; None if they can."""
    for tensor in tensors:
        if tensor.device.type != "cuda" and not interpreted():
            return f"impl 'triton' needs tensors on a GPU, got {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"impl 'triton' needs bfloat16, float16 or float32, got {tensor.dtype}"
        if tensor.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter is wrong for bfloat16: use float16 or float32"
    return None


def covering(size: int, least: int = 1) -> int:
    """The power of two that covers a size, at least `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def precision(x: Tensor) -> str:
    """How Triton multiplies matrices of x's type: float32 without rounding to TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def threshold(probability: float) -> int:
    """The least random word of 32 bits that is kept when elements are dropped with this probability."""
    return min(int(probability * 2**32), 2**32 - 1)


def slice_height(num_rows: int, programs: int, height: int) -> int:
    """Rows of a slice, a multiple of `height`, where each slice of a sum over rows takes so many programs.

    Slices are written and read again, so there are only as many as occupy a chip: 128 programs, at most 8 slices.
    """
    slices = min(_MOST_SLICES, max(1, _PROGRAMS // max(1, programs)))
    return max(1, -(-num_rows // (slices * height))) * height
