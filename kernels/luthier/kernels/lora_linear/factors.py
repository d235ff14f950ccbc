"""Where the rounded factors of a call stand, which the Triton kernels keep for the backward pass.

Shape suffixes: K inputs, N outputs, R rank, Q the ranks of all projections together.
"""

import functools
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Elements of two bytes in 16: where each matrix begins.
_ALIGNED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All A [Q, K], one below the other, then each B [N, R] at a multiple of 16 bytes, in one tensor.

    Attributes:
        sizes: elements of each A, then of each B.
        places: where each of these begins.
        total: elements of all, with the gaps between them.
    """

    sizes: tuple[int, ...]
    places: tuple[int, ...]
    total: int


def layout(shapes: tuple[torch.Size, ...]) -> Layout:
    """The layout for factors of these shapes, which may be symbols: all A, then all B."""
    count = len(shapes) // 2
    sizes = [shape[0] * shape[1] for shape in shapes]
    aligned = [-(-size // _ALIGNED) * _ALIGNED for size in (sum(sizes[:count]), *sizes[count:])]
    *places_of_b, total = accumulate(aligned)
    places = [*accumulate(sizes[: count - 1], initial=0), *places_of_b]
    return Layout(sizes=tuple(sizes), places=tuple(places), total=total)


layout_of = functools.cache(layout)
"""`layout`, kept by the shapes, which then are numbers."""


def shapes_of(factors: list[Tensor]) -> tuple[torch.Size, ...]:
    """The key of a layout."""
    return tuple([factor.shape for factor in factors])


def rounded_parts(rounded: Tensor, factors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A [Q, K] of all projections, and each B [N, R] times its scale, of the rounded factors."""
    count = len(factors) // 2
    K = factors[0].shape[1]
    ranks = [a.shape[0] for a in factors[:count]]
    # as_strided counts from where the memory begins, not from where the tensor does.
    first = rounded.storage_offset()
    places = layout_of(shapes_of(factors)).places[count:]
    b = [
        rounded.as_strided((factor.shape[0], rank), (rank, 1), first + place)
        for factor, rank, place in zip(factors[count:], ranks, places, strict=True)
    ]
    return rounded.as_strided((sum(ranks), K), (K, 1), first), b
