"""What ranks exchange a piece at a time, so that who watches them bounds the time of an exchange whatever the tensor.

Letters: S ranks, N elements of each rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.training.recipes.collective import Collective

PIECE_BYTES = 32 << 20
"""Most that one exchange moves: of a network that moves 20 MB/s, the slowest that is no fault, less than 2 s."""


def buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the gradients in their order in lists of at most `PIECE_BYTES`; of a larger one views of its parts."""
    together: list[Tensor] = []
    held = 0
    for piece in (piece for gradient in gradients for piece in _pieces(gradient)):
        if together and held + piece.nbytes > PIECE_BYTES:
            yield together
            together, held = [], 0
        together.append(piece)
        held += piece.nbytes
    if together:
        yield together


def gather_parts(
    collective: Collective, whole: Tensor, part: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Put the parts of all ranks, S times N elements, one behind the other into `whole`, which may hold this one's.

    Takes `PIECE_BYTES` where that is more. Raises as the collective's `exchange`.
    """
    parts_SN = whole.view(collective.num_ranks, part.numel())
    places = _places(parts_SN)
    for place in places:
        is_all = len(places) == 1
        piece_SN = (
            parts_SN
            if is_all
            else torch.empty_like(parts_SN[:, place], memory_format=torch.contiguous_format)
        )
        with collective.exchange(piece_SN.nbytes):
            dist.all_gather_single(piece_SN.view(-1), part[place], group=group)
        if not is_all:
            parts_SN[:, place].copy_(piece_SN)


def sum_parts(
    collective: Collective, part: Tensor, whole: Tensor, op: Any, group: dist.ProcessGroup | None
) -> None:
    """Put the sum over the ranks of this one's N elements of `whole` into `part`; as `gather_parts` else."""
    parts_SN = whole.view(collective.num_ranks, part.numel())
    for place in _places(parts_SN):
        piece_SN = parts_SN[:, place].contiguous()
        with collective.exchange(piece_SN.nbytes):
            dist.reduce_scatter_single(part[place], piece_SN.view(-1), op=op, group=group)


def _pieces(gradient: Tensor) -> Iterator[Tensor]:
    """Yield views of all of a tensor's elements, none of more than `PIECE_BYTES`."""
    if gradient.nbytes <= PIECE_BYTES:
        yield gradient
    elif gradient.is_contiguous():
        yield from torch.split(gradient.view(-1), PIECE_BYTES // gradient.element_size())
    else:
        rows = max(1, len(gradient) * PIECE_BYTES // gradient.nbytes)
        for some in torch.split(gradient, rows):
            yield from _pieces(some[0] if len(some) == 1 else some)


def _places(parts_SN: Tensor) -> list[slice]:
    """Return which elements of every part are exchanged at a time."""
    num_ranks, num_elements = parts_SN.shape
    most = max(1, PIECE_BYTES // (num_ranks * parts_SN.element_size()))
    return [slice(first, first + most) for first in range(0, num_elements, most)]
