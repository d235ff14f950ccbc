"""Rotary position embedding (arXiv:2104.09864), the halves of a head rotated against each other.

Shape suffixes: T tokens, H heads, D head size, R turned elements of a head. Importing this package does not import
torch.
"""

from typing import TYPE_CHECKING

from luthier.kernels.tables import Impl, resolve, row_class

if TYPE_CHECKING:
    from torch import Tensor


def rope(x_THD: "Tensor", cos_TR: "Tensor", sin_TR: "Tensor", *, impl: Impl = "auto") -> "Tensor":
    """Queries or keys turned by the angles of their tokens: x cos + (-x_high, x_low) sin on the first R elements.

    The angles are constants: they get no gradient. `cpu` is C++ (bfloat16 or float32, computed in float32); `eager`
    is plain torch; `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    from luthier.kernels.operands import refusal, require_same

    require_same(x=x_THD, cos=cos_TR, sin=sin_TR)
    shapes = [tuple(tensor.shape) for tensor in (x_THD, cos_TR, sin_TR)]
    fits = (
        len(shapes[0]) == 3
        and len(shapes[1]) == 2
        and shapes[1] == shapes[2]
        and shapes[0][0] == shapes[1][0]
    )
    if not fits or shapes[1][1] % 2 or not 0 < shapes[1][1] <= shapes[0][2]:
        raise ValueError(
            f"shapes must be x [T, H, D], cos and sin [T, R] with R even and at most D, got {shapes}"
        )
    shape = row_class(x_THD.shape[0], x_THD.numel(), x_THD.device.type)
    chosen = resolve("rope", impl, refusal(impl, x_THD), x_THD, shape)
    if chosen == "eager":
        from luthier.kernels.rope.reference import rope_reference

        return rope_reference(x_THD, cos_TR, sin_TR)
    from luthier.kernels.direct import run
    from luthier.kernels.rope.cpu import rope_op

    transposed = False
    out_THD: Tensor = run(chosen, rope_op, x_THD, cos_TR, sin_TR, transposed)
    return out_THD
