"""Linear layers without an update, frozen or trained.

Shape suffixes: M rows, K inputs, N outputs. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from luthier.kernels.dequantise import FEW_ROWS, codes_refusal, format_of, is_quantised
from luthier.kernels.tables import Impl, forced, measured, resolve

if TYPE_CHECKING:
    from torch import Tensor


def linear(
    x: "Tensor", weight_NK: "Tensor", bias_N: "Tensor | None" = None, *, impl: Impl = "auto"
) -> "Tensor":
    """X weight^T + bias: [..., K] -> [..., N], differentiable in all three.

    `cpu` (C++; bfloat16 or float32) accumulates in float32 and rounds once, and the bits of a row depend neither on
    the number of threads nor on the other rows; `triton` is there for quantised weights alone, whose codes it reads;
    `eager` is torch's own; `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    from luthier.kernels.operands import require_same

    require_same(x=x, weight=weight_NK, **({} if bias_N is None else {"bias": bias_N}))
    fits = x.dim() >= 1 and weight_NK.dim() == 2 and x.shape[-1] == weight_NK.shape[1] > 0
    if not fits or (bias_N is not None and bias_N.shape != weight_NK.shape[:1]):
        shapes = [tuple(one.shape) for one in (x, weight_NK, bias_N) if one is not None]
        raise ValueError(f"shapes must be x [..., K], weight [N, K], bias [N], got {shapes}")
    why = _refusal(impl, x, weight_NK)
    chosen = resolve("linear", impl, why, x, shape_class(x.numel() // x.shape[-1], x, weight_NK))
    if chosen == "eager":
        from luthier.kernels.linear.reference import linear_reference

        return linear_reference(x, weight_NK, bias_N)
    from luthier.kernels.direct import run
    from luthier.kernels.linear.cpu import linear_op

    flat_MK = x.reshape(-1, x.shape[-1])
    bias = x.new_empty(0) if bias_N is None else bias_N
    flat_MN: Tensor = run(chosen, linear_op, flat_MK, weight_NK, bias)
    return flat_MN.view(*x.shape[:-1], flat_MN.shape[1])


def wide_linear(x: "Tensor", weight_NK: "Tensor", *, impl: Impl = "auto") -> "Tensor":
    """X weight^T as it is summed, in float32: [..., K] -> [..., N], differentiable in both.

    `cpu` (C++) reads bfloat16 as it stands, and a row's bits depend neither on threads nor on other rows; `eager`
    widens the weight part by part; `auto` takes what the committed table measured as faster. What is not bfloat16 is
    multiplied as `linear` does.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    import torch

    from luthier.kernels.operands import no_triton, refusal, require_same

    if x.dtype != torch.bfloat16:
        return linear(x, weight_NK, impl=impl).float()
    require_same(x=x, weight=weight_NK)
    if x.dim() < 1 or weight_NK.dim() != 2 or not x.shape[-1] == weight_NK.shape[1] > 0:
        raise ValueError(
            f"shapes must be x [..., K], weight [N, K], got {tuple(x.shape)}, {tuple(weight_NK.shape)}"
        )
    x_MK = x.reshape(-1, x.shape[-1])
    why = no_triton("linear", impl, x) or refusal(impl, x)
    chosen = resolve("linear", impl, why, x, wide_shape_class(x_MK.shape[0]))
    if chosen == "eager":
        from luthier.kernels.linear.reference import wide_linear_reference

        flat_MN = wide_linear_reference(x_MK, weight_NK)
    else:
        from luthier.kernels.direct import run
        from luthier.kernels.linear.cpu import wide_linear_op

        flat_MN = run(chosen, wide_linear_op, x_MK, weight_NK)
    return flat_MN.view(*x.shape[:-1], flat_MN.shape[1])


def wide_shape_class(rows: int) -> str:
    """The class of `wide_linear` of so many rows in the table."""
    return f"{_size(rows)}_rows-wide"


def _size(rows: int) -> str:
    return "one" if rows < 4 else "few" if rows < 64 else "many"


def reads_codes(x: "Tensor", weight_NK: "Tensor") -> bool:
    """Whether `auto` multiplies rows x [..., K] on a GPU, there and back, with the codes of a quantised weight.

    The table of `linear` says so, for every operator whose base is such a product.
    """
    if x.device.type != "cuda":
        return False
    wanted: str = forced()
    if wanted == "auto":
        shape = packed_shape_class(x.numel() // x.shape[-1], format_of(weight_NK))
        wanted = measured("linear", x, shape) or "eager"
    # Last: it takes several times as long as the table, and each projection asks, there and back.
    return wanted == "triton" and _refusal("auto", x, weight_NK) is None


def _refusal(impl: Impl, x: "Tensor", weight_NK: "Tensor") -> str | None:
    from luthier.kernels.operands import no_triton, refusal

    if is_quantised(weight_NK):
        return codes_refusal(impl, weight_NK, weight_NK.shape[1]) or refusal(impl, x)
    return no_triton("linear", impl, x) or refusal(impl, x)


def packed_shape_class(rows: int, quantised: str) -> str:
    """The class on a GPU of a product of so many rows, there and back, with a weight of this format."""
    return f"{'few' if rows <= FEW_ROWS else 'some' if rows < 1024 else 'many'}_rows-{quantised}"


def shape_class(rows: int, x: "Tensor", weight_NK: "Tensor") -> str:
    """The class of a problem in the table: how many rows, and whether the weight gets a gradient, x alone, or none.

    On a GPU, of a quantised weight, `packed_shape_class`.
    """
    import torch

    if x.device.type == "cuda" and is_quantised(weight_NK):
        return packed_shape_class(rows, format_of(weight_NK))
    size = _size(rows)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight_NK.requires_grad):
        return f"{size}_rows-no_gradient"
    return f"{size}_rows-{'trained' if weight_NK.requires_grad else 'frozen'}"
