"""Root-mean-square layer norm (arXiv:1910.07467).

Shape suffixes: D size of a row. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from luthier.kernels.tables import Impl, kernels_of, resolve, row_class

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(
    x: "Tensor", weight_D: "Tensor", epsilon: float, *, offset: float = 0.0, impl: Impl = "auto"
) -> "Tensor":
    """X / sqrt(mean(x^2) + epsilon) * (weight + offset) over the last dimension; Gemma's weights have offset 1.

    All is computed in float32 (float64 for float64) and rounded once. `cpu` (C++; bfloat16 or float32; frozen
    weight); `eager` is plain torch; `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    import torch

    from luthier.kernels.operands import refusal, require_same

    require_same(x=x, weight=weight_D)
    if x.dim() < 1 or weight_D.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise ValueError(
            f"shapes must be x [..., D], weight [D], got {tuple(x.shape)}, {tuple(weight_D.shape)}"
        )
    why = refusal(impl, x)
    if weight_D.requires_grad and torch.is_grad_enabled():
        why = why or f"impl {kernels_of(impl, x)!r} needs a frozen weight, got weight.requires_grad=True"
    chosen = resolve("rms_norm", impl, why, x, row_class(x.numel() // x.shape[-1], x.numel(), x.device.type))
    if chosen == "eager":
        from luthier.kernels.rms_norm.reference import rms_norm_reference

        return rms_norm_reference(x, weight_D, epsilon, offset)
    from luthier.kernels.direct import run
    from luthier.kernels.rms_norm.cpu import rms_norm_op

    flat: Tensor = run(chosen, rms_norm_op, x.reshape(-1, x.shape[-1]), weight_D, epsilon, offset)[0]
    return flat.view(x.shape)
