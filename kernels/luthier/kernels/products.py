"""Sums of matrix products in C++. Shape suffixes: M rows, N columns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.dequantise import is_quantised
from luthier.kernels.dequantise.cpu import codes_of
from luthier.kernels.operands import row_pointer, rows_of, settings

Term = tuple[Tensor, Tensor, bool]
"""Rows [M, K], a matrix, which may be quantised, and whether the matrix is transposed: [N, K], or [K, N]."""


class Matrix(NamedTuple):
    """A matrix as C++ reads it.

    Attributes:
        place: (address, row stride); of a quantised one where its codes are, and its row length.
        owner: what holds that memory, as long as a product reads it.
    """

    place: tuple[Any, ...]
    owner: object


def matrix_of(matrix: Tensor) -> Matrix:
    """A matrix, which may be quantised, for the terms of products."""
    if is_quantised(matrix):
        codes = codes_of(matrix)
        return Matrix((codes.place(matrix.shape[1]),), codes)
    rows = rows_of(matrix)
    return Matrix(row_pointer(rows), rows)


def product(
    terms: Sequence[Term], out_MN: Tensor, bias_N: Tensor | None = None, addend_MN: Tensor | None = None
) -> Tensor:
    """Sum of the terms' matrix products + bias + addend, into `out_MN`, rounded once to its type.

    That is the type of the terms, or float32.
    """
    # Kept until the product is done: scales of a quantised matrix, or the copy of one that is not row-major, have no
    # other owner.
    held = [(rows_of(rows), matrix_of(matrix), turned) for rows, matrix, turned in terms]
    _core.product(
        terms=[(*row_pointer(rows), *matrix.place, rows.shape[1], turned) for rows, matrix, turned in held],
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
