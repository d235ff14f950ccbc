"""AdamW (arXiv:1711.05101) whose moments have 8 bits between updates (arXiv:2110.02861), as torchao holds them.

Importing this package imports neither torch nor torchao.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.kernels.tables import Impl, resolve

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
"""Moments that share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How an update changes weights.

    Attributes:
        learning_rate: of this update.
        weight_decay: decoupled; times the learning rate.
        betas: what is kept of the moments.
        epsilon: added to the root of the second.
        number: of this update, from 1.
    """

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    number: int


def fresh_moments(weight: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return both moments of a weight before the first update: zeros, as torchao's `OptimState8bit`.

    Raises:
        ValueError: the weight is no whole number of blocks.
    """
    from torchao.optim.subclass_8bit import OptimState8bit

    if weight.numel() % BLOCK:
        raise ValueError(f"moments of 8 bits need a multiple of {BLOCK} weights, got {weight.numel()}")
    options: dict[str, Any] = {"block_size": BLOCK, "device": weight.device, "dtype": weight.dtype}
    mean = OptimState8bit.zeros(weight.shape, signed=True, **options)
    return mean, OptimState8bit.zeros(weight.shape, signed=False, **options)


def adamw_8bit(
    weight: "Tensor", grad: "Tensor", moments: "tuple[Tensor, Tensor]", rates: Rates, *, impl: Impl = "auto"
) -> None:
    """Change a float32 weight and its moments, of `fresh_moments`, in place, by a float32 gradient of its shape.

    The update is of moments in float32; what is kept of them is rounded to the nearest of 256 values, of which the
    greatest of a block is one. `cpu` is C++, whose bits do not depend on the number of threads; `eager` is torchao's
    own; `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: types or shapes do not fit, or `impl` cannot run on them.
    """
    import torch

    from luthier.kernels.operands import no_triton, refusal, require_same

    require_same(weight=weight, grad=grad)
    fits = (
        weight.dtype == torch.float32 and weight.shape == grad.shape == moments[0].shape == moments[1].shape
    )
    if not fits or not (weight.is_contiguous() and grad.is_contiguous()):
        shapes = [tuple(one.shape) for one in (weight, grad, *moments)]
        raise ValueError(
            f"weight, grad and moments must be dense float32 of one shape, got {weight.dtype} of {shapes}"
        )
    why = no_triton("adamw_8bit", impl, weight) or refusal(impl, weight)
    if resolve("adamw_8bit", impl, why, weight, "any") == "eager":
        from luthier.kernels.adamw_8bit.reference import adamw_8bit_reference

        adamw_8bit_reference(weight, grad, moments, rates)
    else:
        from luthier.kernels.adamw_8bit.cpu import adamw_8bit_cpu

        adamw_8bit_cpu(weight, grad, moments, rates)
