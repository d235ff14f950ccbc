"""Operators on tensors that stay where they are, told once and run in one call: nothing waits for Python between them.

What each computes is what the operator of that name computes in C++. Shape suffixes: M the most rows, N outputs, F
inputs of a gate, H heads, D size of a row or a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.attention_decode import Cached
from luthier.kernels.attention_decode import cpu as attention_decode
from luthier.kernels.gated_activation import cpu as gated_activation
from luthier.kernels.operands import row_pointer, settings
from luthier.kernels.products import Term
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
    that are rounded to it. The program holds them, and reads and writes them where they are: whoever tells it keeps
    weights in their place.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._program = _core.Program()
        self._bfloat16 = dtype == torch.bfloat16
        self._held: list[Tensor] = []

    def product(
        self,
        terms: Sequence[Term],
        out_MN: Tensor,
        bias_N: Tensor | None = None,
        addend_MN: Tensor | None = None,
    ) -> None:
        """Sum of the terms' matrix products + bias + addend, as `products.product`; `out_MN` may be the addend."""
        self._hold(out_MN, bias_N, addend_MN, *(one for rows, matrix, _ in terms for one in (rows, matrix)))
        self._program.product(
            terms=[
                (*row_pointer(rows), *row_pointer(matrix), rows.shape[1], turned)
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
        self._hold(x, weight_D, out, inverse_R)
        self._program.rms_norm(
            rms_norm.problem_of(x_RD, weight_D, out_RD, inverse_R, options), len(x_RD) // len(x)
        )

    def gated(self, gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor, *, gelu: bool) -> None:
        """Gated activations, silu or gelu by tanh, into `out_MF`, which is dense and may be one of the others."""
        self._hold(gate_MF, up_MF, out_MF)
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
        self._hold(*heads, out_MHD)
        self._program.attend(attention_decode.problem_of(heads, out_MHD, 0, options), layer, turns)

    def run(self, rows: Rows) -> None:
        """Run all operators in their order, for the rows of the run: the first of the tensors' rows."""
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

    def _hold(self, *tensors: Tensor | None) -> None:
        self._held += [one for one in tensors if one is not None]
