"""What the Triton faces of the operators share on the host: architectures and launch configurations."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton.knobs import runtime

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
"""By architecture: sm_80, sm_90, sm_100, gfx942; `*` is any other."""


def interpreted() -> bool:
    """Tell whether Triton runs kernels in its interpreter, on tensors in main memory."""
    return bool(runtime.interpret)


def architecture(device: torch.device) -> str:
    """The name of a device's architecture as the launch tables have it."""
    if device.type != "cuda":
        return "*"
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "")
    return name.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def launch_for(table: Launches, device: torch.device) -> Launch:
    """The launch configuration for a device."""
    return table.get(architecture(device), table["*"])


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
