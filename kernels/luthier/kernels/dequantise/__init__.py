"""Frozen weights of 8 or 4 bits, as torchao holds them, made into numbers that are multiplied with.

`Int8Tensor` (a scale for each row) and `NF4Tensor` (arXiv:2305.14314: blocks of normal floats, whose scales have 8 bits
themselves) stand wherever an operator takes a frozen weight. What is multiplied with is made forward, and anew
for the gradient: by products in C++ piece by piece, by those in Triton that read codes tile by tile, elsewhere as a
whole for the length of a product.

Shape suffixes: N outputs, K inputs. Importing this package imports neither torch nor torchao.
"""

from typing import TYPE_CHECKING, Any

from luthier.kernels.tables import Impl, kernels_of, resolve

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"Int8Tensor": "int8", "NF4Tensor": "nf4"}
"""Classes of torchao's tensors -> the class of their problems in the table."""
NF4_BLOCK = 64
"""Weights of a block of NF4, as Triton's kernels read them."""
FEW_ROWS = 64
"""Most rows that Triton's products with codes hold in one tile, and of the class `few_rows` of their table."""


def is_quantised(weight: "Tensor") -> bool:
    """Whether a tensor is one of torchao's of 8 or 4 bits. A look at its class: nothing is imported for it."""
    found = type(weight)
    return found.__name__ in FORMATS and found.__module__.startswith("torchao.")


def format_of(weight: "Tensor") -> str:
    """The format of a quantised weight, as classes of problems name it: int8 or nf4."""
    return FORMATS[type(weight).__name__]


def dense(weight: "Tensor") -> "Tensor":
    """The weight [N, K] as it is multiplied with: itself, or what `dequantise` makes of it."""
    return dequantise(weight) if is_quantised(weight) else weight


def dequantise(weight_NK: "Tensor", *, impl: Impl = "auto") -> "Tensor":
    """A quantised weight as a tensor [N, K] of the type that it stands for, which is bfloat16 or float32.

    `eager` is torchao's own; `cpu` (C++) and `triton` have the very same bits: a code's value times its scale, rounded
    once.
    `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: the weight is not quantised, or `impl` cannot run on it.
    """
    from luthier.kernels.operands import refusal

    if not is_quantised(weight_NK):
        raise ValueError(
            f"weight must be one of torchao's {', '.join(FORMATS)}, got {type(weight_NK).__name__}"
        )
    why = codes_refusal(impl, weight_NK) or refusal(impl, weight_NK)
    chosen = resolve("dequantise", impl, why, weight_NK, format_of(weight_NK))
    if chosen == "eager":
        from luthier.kernels.dequantise.reference import dequantise_reference

        return dequantise_reference(weight_NK)
    if chosen == "triton":
        from luthier.kernels.dequantise.triton import dequantise_triton

        return dequantise_triton(weight_NK)
    from luthier.kernels.dequantise.cpu import dequantise_cpu

    return dequantise_cpu(weight_NK)


def codes_refusal(impl: Impl, weight_NK: "Tensor", row_length: int = 0) -> str | None:
    """Why Triton's kernels, where `impl` would run them, do not read the codes of a weight; None if they can.

    A product reads them row by row: each of `row_length` is to hold whole blocks.
    """
    if kernels_of(impl, weight_NK) == "cpu" or format_of(weight_NK) != "nf4":
        return None
    held: Any = weight_NK
    if held.block_size == NF4_BLOCK and row_length % NF4_BLOCK == 0:
        return None
    return (
        f"impl 'triton' needs NF4 in blocks of {NF4_BLOCK}, whole ones in each row of a product, got blocks of "
        f"{held.block_size} in a weight of shape {tuple(weight_NK.shape)}"
    )
