"""Sums of matrix products in C++. Shape suffixes: M rows, N columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.dequantise.cpu import dense_for_product
from luthier.kernels.operands import row_pointer, rows_of, settings

Term = tuple[Tensor, Tensor, bool]
"""Rows [M, K], a matrix, which may be quantised, and whether the matrix is transposed: [N, K], or [K, N]."""


def product(
    terms: Sequence[Term], out_MN: Tensor, bias_N: Tensor | None = None, addend_MN: Tensor | None = None
) -> Tensor:
    """Sum of the terms' matrix products + bias + addend, into `out_MN`, rounded once to its type.

    That is the type of the terms, or float32.
    """
    # Kept until the product is done: what is made of a quantised matrix, or of one that is not row-major, has no other
    # owner.
    matrices = dense_for_product([matrix for _, matrix, _ in terms])
    held = [
        (rows_of(rows), rows_of(matrix), turned)
        for (rows, _, turned), matrix in zip(terms, matrices, strict=True)
    ]
    _core.product(
        terms=[
            (*row_pointer(rows), *row_pointer(matrix), rows.shape[1], turned) for rows, matrix, turned in held
        ],
        num_rows=out_MN.shape[0],
        num_columns=out_MN.shape[1],
        bias=0 if bias_N is None else bias_N.data_ptr(),
        addend=row_pointer(addend_MN),
        out=row_pointer(out_MN),
        bfloat16=terms[0][0].dtype == torch.bfloat16,
        float_out=out_MN.dtype == torch.float32,
        **settings(),
    )
    return out_MN
