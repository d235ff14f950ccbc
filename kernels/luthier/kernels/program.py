"""Operators on tensors that stay where they are, told once and run in one call: nothing waits for Python between them.

What each computes is what the operator of that name computes in C++. Shape suffixes: M the most rows, N outputs, F
inputs of a gate, H heads, D size of a row or a head.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.attention_decode import Cached
from luthier.kernels.attention_decode import cpu as attention_decode
from luthier.kernels.gated_activation import cpu as gated_activation
from luthier.kernels.operands import row_pointer, settings
from luthier.kernels.products import Matrix, Term, matrix_of
from luthier.kernels.rms_norm import cpu as rms_norm


class Rows(NamedTuple):
    """What a run is about: rows, each with one new token.

    Attributes:
        layers: the caches of each layer.
        held: tokens that each cache of each layer holds.
        first: the first of its own keys that each row sees.
        angles: cosines and sines [rows, R], dense.
    """

    layers: Sequence[Sequence[Cached]]
    held: Sequence[Sequence[int]]
    first: Sequence[int]
    angles: tuple[Tensor, Tensor]


class Program:
    """A sequence of operators, for any number of rows up to that of its tensors.

    All tensors are on the processor, dense along their rows, and of one type, bfloat16 or float32, but for float32 ones
    that are rounded to it; matrices of products may be quantised. The program holds them, and reads and writes them
    where they are: whoever tells it keeps weights in their place.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._program = _core.Program()
        self._bfloat16 = dtype == torch.bfloat16
        self._dtype = dtype
        self._owners: list[object] = []
        self._most_rows = sys.maxsize
        self._attended: list[tuple[int, tuple[int, int], bool]] = []

    def product(
        self,
        terms: Sequence[Term],
        out_MN: Tensor,
        bias_N: Tensor | None = None,
        addend_MN: Tensor | None = None,
    ) -> None:
        """Sum of the terms' matrix products + bias + addend, as `products.product`; `out_MN` may be the addend."""
        self._hold_rows(out_MN, *(rows for rows, _, _ in terms), *(() if addend_MN is None else (addend_MN,)))
        self._hold(bias_N)
        self._program.product(
            terms=[
                (*row_pointer(rows), *self._matrix(matrix).place, rows.shape[1], turned)
                for rows, matrix, turned in terms
            ],
            num_columns=out_MN.shape[1],
            bias=0 if bias_N is None else bias_N.data_ptr(),
            addend=row_pointer(addend_MN),
            out=row_pointer(out_MN),
            bfloat16=self._bfloat16,
        )

    def rms_norm(self, x: Tensor, weight_D: Tensor, out: Tensor, options: tuple[float, float]) -> None:
        """Norms of rows [M, D], or of their heads [M, H, D], into `out`, which may be x; epsilon and offset."""
        x_RD, out_RD = (one.view(-1, one.shape[-1]) for one in (x, out))
        inverse_R = torch.empty(len(x_RD), dtype=torch.float32, device="cpu")
        self._hold_rows(x, out)
        self._hold(weight_D, inverse_R)
        self._program.rms_norm(
            rms_norm.problem_of(x_RD, weight_D, out_RD, inverse_R, options), len(x_RD) // len(x)
        )

    def gated(self, gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor, *, gelu: bool) -> None:
        """Gated activations, silu or gelu by tanh, into `out_MF`, which is dense and may be one of the others."""
        self._hold_rows(gate_MF, up_MF, out_MF)
        problem = gated_activation.problem_of(gate_MF, up_MF, gelu)
        self._program.gated(problem | {"out": out_MF.data_ptr()})

    def round_to(self, parts: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """Factors times dense float32 tensors, rounded into dense ones."""
        self._hold(*(one for given, made, _ in parts for one in (given, made)))
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

        They are turned by the run's angles or not; `options` are scale and softcap.
        """
        self._hold_rows(*heads, out_MHD)
        self._attended.append((layer, (heads[1].shape[1], heads[1].shape[2]), turns))
        self._program.attend(attention_decode.problem_of(heads, out_MHD, 0, options), layer, turns)

    def run(self, rows: Rows) -> None:
        """Run all operators in their order, for the rows of the run: the first of the tensors' rows.

        Raises:
            ValueError: there are more rows than the tensors have, or caches or angles do not fit them; nothing is
                written then.
        """
        self._check(rows)
        self._program.run(
            num_rows=len(rows.first),
            layers=[
                attention_decode.layouts_of(caches, held)
                for caches, held in zip(rows.layers, rows.held, strict=True)
            ],
            first=rows.first,
            angles=(rows.angles[0].data_ptr(), rows.angles[1].data_ptr(), rows.angles[0].shape[1]),
            **settings(),
        )

    def _check(self, rows: Rows) -> None:
        num_rows = len(rows.first)
        if num_rows > self._most_rows:
            raise ValueError(f"a run must have at most {self._most_rows} rows, got {num_rows}")
        if num_rows and min(rows.first) < 0:
            raise ValueError(f"first keys must not be negative, got {min(rows.first)}")
        for layer, head, turns in self._attended:
            if layer >= min(len(rows.layers), len(rows.held)):
                raise ValueError(
                    f"a run needs caches for every layer of its program, got none of layer {layer}"
                )
            self._check_caches(rows.layers[layer], rows.held[layer], head, num_rows)
            if turns:
                self._check_angles(rows.angles, head[1], num_rows)

    def _check_caches(
        self, caches: Sequence[Cached], held: Sequence[int], head: tuple[int, int], num_rows: int
    ) -> None:
        if len(held) != len(caches) or sum(one.layout.num_rows for one in caches) != num_rows:
            raise ValueError(
                f"caches must hold {num_rows} rows, got {[one.layout.num_rows for one in caches]}"
            )
        for cached, length in zip(caches, held, strict=True):
            if cached.layout.head != head or cached.key_BGCD.dtype != self._dtype:
                raise ValueError(
                    f"a cache must hold {self._dtype} [B, {head[0]}, C, {head[1]}], got {cached.key_BGCD.dtype} "
                    f"{tuple(cached.key_BGCD.shape)}"
                )
            if not 0 <= length < cached.layout.capacity:
                raise ValueError(
                    f"a cache needs room for a new token after {length}, got a capacity of {cached.layout.capacity}"
                )

    def _check_angles(self, angles: tuple[Tensor, Tensor], size: int, num_rows: int) -> None:
        cos, sin = angles
        is_even = cos.dim() == 2 and cos.shape[1] % 2 == 0 and 0 < cos.shape[1] <= size
        is_plain = all(one.is_contiguous() and one.dtype == self._dtype for one in angles)
        if not (is_even and is_plain and cos.shape == sin.shape and len(cos) == num_rows):
            raise ValueError(
                f"angles must be dense {self._dtype} [{num_rows}, R], R even and at most {size}, "
                f"got {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
            )

    def _matrix(self, matrix: Tensor) -> Matrix:
        """A matrix where it stands, held."""
        found = matrix_of(matrix)
        self._owners.append(found.owner)
        return found

    def _hold_rows(self, *tensors: Tensor) -> None:
        """Hold tensors that have as many rows as a run may have."""
        self._most_rows = min(self._most_rows, *map(len, tensors))
        self._hold(*tensors)

    def _hold(self, *tensors: Tensor | None) -> None:
        self._owners += [one for one in tensors if one is not None]
