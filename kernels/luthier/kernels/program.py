"""Operators on tensors that stay where they are, told once and run in one call: nothing waits for Python between them.

What each computes is what the operator of that name computes in C++. Shape suffixes: M the most rows, N outputs, F
inputs of a gate, H heads, D size of a row or a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.attention_decode import Cached, Span
from luthier.kernels.attention_decode import cpu as attention_decode
from luthier.kernels.gated_activation import cpu as gated_activation
from luthier.kernels.operands import DTYPES, row_pointer, settings
from luthier.kernels.products import Matrix, Term, matrix_of
from luthier.kernels.rms_norm import cpu as rms_norm


class Rows(NamedTuple):
    """What a run is about: rows, each a new token of a row of a cache.

    Attributes:
        num_rows: how many.
        layers: the caches of each layer.
        spans: which columns of each cache of each layer are new.
        first: the column in which each row of the caches begins.
        angles: cosines and sines [num_rows, R], dense.
    """

    num_rows: int
    layers: Sequence[Sequence[Cached]]
    spans: Sequence[Sequence[Span]]
    first: Sequence[int]
    angles: tuple[Tensor, Tensor]


class Program:
    """A sequence of operators, for any number of rows up to that of its tensors.

    All tensors are on the processor, dense along their rows, and of one type, bfloat16 or float32, but for float32 ones
    that are rounded to it; matrices of products may be quantised. The program holds them, and reads and writes them
    where they are: whoever tells it keeps weights in their place. What tells it raises ValueError where a tensor is no
    such one or does not fit the others; all numbers are checked in C++ besides, before anything is read or written.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Raises ValueError for a type that C++ does not have."""
        if dtype not in DTYPES:
            raise ValueError(f"a program must be of bfloat16 or float32, got {dtype}")
        self._program = _core.Program()
        self._bfloat16 = dtype == torch.bfloat16
        self._dtype = dtype
        self._held: list[object] = []

    def product(
        self,
        terms: Sequence[Term],
        out_MN: Tensor,
        bias_N: Tensor | None = None,
        addend_MN: Tensor | None = None,
    ) -> None:
        """Sum of the terms' matrix products + bias + addend, as `products.product`; `out_MN` may be the addend."""
        num_rows, num_columns = out_MN.shape
        self._hold(out_MN.shape, out_MN, addend_MN)
        self._hold((num_columns,), bias_N)
        for rows, _, _ in terms:
            self._hold((num_rows, rows.shape[1]), rows)
        shapes = [
            (num_columns, rows.shape[1]) if turned else (rows.shape[1], num_columns)
            for rows, _, turned in terms
        ]
        self._program.product(
            terms=[
                (*row_pointer(rows), *self._matrix(shape, matrix).place, rows.shape[1], turned)
                for (rows, matrix, turned), shape in zip(terms, shapes, strict=True)
            ],
            num_rows=num_rows,
            num_columns=num_columns,
            bias=0 if bias_N is None else bias_N.data_ptr(),
            addend=row_pointer(addend_MN),
            out=row_pointer(out_MN),
            bfloat16=self._bfloat16,
        )

    def rms_norm(self, x: Tensor, weight_D: Tensor, out: Tensor, options: tuple[float, float]) -> None:
        """Norms of rows [M, D], or of their heads [M, H, D], into `out`, which may be x; epsilon and offset."""
        self._hold(x.shape, x, out)
        self._hold(x.shape[-1:], weight_D)
        x_RD, out_RD = (one.view(-1, one.shape[-1]) for one in (x, out))
        inverse_R = torch.empty(len(x_RD), dtype=torch.float32, device="cpu")
        self._held.append(inverse_R)
        self._program.rms_norm(
            rms_norm.problem_of(x_RD, weight_D, out_RD, inverse_R, options), len(x_RD) // len(x)
        )

    def gated(self, gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor, *, gelu: bool) -> None:
        """Gated activations, silu or gelu by tanh, into `out_MF`, which is dense and may be one of the others."""
        self._hold(gate_MF.shape, gate_MF, up_MF, out_MF)
        if not out_MF.is_contiguous():
            raise ValueError(f"what a gate writes must be dense, got strides {out_MF.stride()}")
        problem = gated_activation.problem_of(gate_MF, up_MF, gelu)
        self._program.gated(problem | {"out": out_MF.data_ptr()})

    def round_to(self, parts: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Factors times dense float32 tensors, rounded into dense ones."""
        for given, made, _ in parts:
            self._hold(given.shape, made)
            if given.dtype != torch.float32 or not (given.is_contiguous() and made.is_contiguous()):
                raise ValueError(f"what is rounded must be dense and float32, got {given.dtype}")
            self._held.append(given)
        self._program.round_to(
            [(given.data_ptr(), made.data_ptr(), given.numel(), scale) for given, made, scale in parts],
            self._bfloat16,
        )

    def attend(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        out_MHD: Tensor,
        layer: int,
        *,
        turns: bool,
        options: tuple[float, float],
    ) -> None:
        """`attention_decode` over a layer's caches of query, key and value [M, heads, D].

        They are turned by the run's angles or not; `options` are scale and softcap. `out` is dense.
        """
        query_MHD, key_MGD, value_MGD = heads
        num_rows, _, size = query_MHD.shape
        self._hold(query_MHD.shape, query_MHD)
        self._hold((num_rows, key_MGD.shape[1], size), key_MGD, value_MGD)
        self._hold(out_MHD.shape, out_MHD)
        if len(out_MHD) != num_rows or out_MHD.numel() != query_MHD.numel() or not out_MHD.is_contiguous():
            raise ValueError(f"out must be dense and as large as the query, got {tuple(out_MHD.shape)}")
        self._program.attend(attention_decode.problem_of(heads, out_MHD, 0, options), layer, turns)

    def run(self, rows: Rows) -> None:
        """Run all operators in their order, for the rows of the run: the first of the tensors' rows.

        Raises:
            ValueError: there are more rows than the tensors have, or caches or angles do not fit them; nothing is
                written then.
        """
        self._program.run(
            num_rows=rows.num_rows,
            layers=[
                attention_decode.layouts_of(caches, spans)
                for caches, spans in zip(rows.layers, rows.spans, strict=True)
            ],
            first=rows.first,
            angles=self._angles(rows.angles),
            **settings(),
        )

    def _angles(self, angles: tuple[Tensor, Tensor]) -> tuple[int, int, int, int, bool]:
        """Where angles lie, how many there are and of what type, for C++, which knows dense ones alone."""
        cos, sin = angles
        is_plain = all(one.is_contiguous() and one.dtype == self._dtype for one in angles)
        if not is_plain or cos.shape != sin.shape or cos.dim() != 2:
            raise ValueError(
                f"angles must be two dense {self._dtype} [N, R], got {cos.dtype} {tuple(cos.shape)} and {sin.dtype} "
                f"{tuple(sin.shape)}"
            )
        return cos.data_ptr(), sin.data_ptr(), *cos.shape, self._bfloat16

    def _hold(self, shape: Sequence[int], *tensors: Tensor | None) -> None:
        """Hold tensors, which have to be of a shape, of the program's type, and dense along their rows."""
        for one in tensors:
            if one is not None:
                self._require(shape, one)
                self._held.append(one)

    def _require(self, shape: Sequence[int], one: Tensor) -> None:
        is_dense = one.stride(-1) == 1 or one.shape[-1] == 1
        is_fit = one.dtype == self._dtype and one.device.type == "cpu" and one.shape == torch.Size(shape)
        if not (is_dense and is_fit):
            raise ValueError(
                f"a tensor must be {self._dtype} {tuple(shape)} on the processor, dense along its rows, got "
                f"{one.dtype} {tuple(one.shape)} on {one.device} with strides {one.stride()}"
            )

    def _matrix(self, shape: Sequence[int], matrix: Tensor) -> Matrix:
        """A matrix of a shape where it stands, held."""
        self._require(shape, matrix)
        found = matrix_of(matrix)
        self._held += [matrix, found.owner]
        return found
