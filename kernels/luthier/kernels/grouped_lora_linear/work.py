"""What each program of the Triton kernels of `grouped_lora_linear` works on, as tables of int64.

A row of the table of parts holds its first row, end, rank, place among all ranks, seed, stream, row0, threshold of
dropout, and the bits of the float32 numbers 1 / (1 - probability) and scale. A row of work holds the part, first row,
end, first rank, and the address of the result. A row of the sums holds the addresses of the first slice and of the
sum, the number of slices, the elements of one, and the distance from one to the next.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from luthier.kernels.gpu import threshold
from luthier.kernels.grouped_lora_linear.cpu import Part

PART_FIELDS = 10
WORK_FIELDS = 5
SUM_FIELDS = 5


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [first, last) of the part of this index."""

    part: int
    first: int
    last: int


def cut(parts: Sequence[Part], height: int) -> list[Rows]:
    """The rows of each part, in order, in pieces of so many."""
    return [
        Rows(index, first, min(first + height, part.end))
        for index, part in enumerate(parts)
        for first in range(part.first, part.end, height)
    ]


def work_table(
    parts: Sequence[Part], rows: Sequence[Rows], width: int, places: Sequence[int] = ()
) -> list[int]:
    """The table of work: each piece of rows with each block of so many ranks; `places` is where its result goes."""
    return [
        value
        for piece, address in zip(rows, places or [0] * len(rows), strict=True)
        for start in range(0, parts[piece.part].rank, width)
        for value in (piece.part, piece.first, piece.last, start, address)
    ]


def bounds_table(parts: Sequence[Part], num_rows: int, height: int) -> list[int]:
    """For each tile of so many rows, the first part that reaches into it, and the one behind the last."""
    found, first = [], 0
    for start in range(0, num_rows, height):
        while first < len(parts) and parts[first].end <= start:
            first += 1
        last = first
        while last < len(parts) and parts[last].first < start + height:
            last += 1
        found += [first, last]
    return found


def parts_table(parts: Sequence[Part], scales: Sequence[float]) -> list[int]:
    """The table of parts."""

    def bits(value: float) -> int:
        return int(struct.unpack("<i", struct.pack("<f", value))[0])

    return [
        value
        for part in parts
        for value in (
            *(part.first, part.end, part.rank, part.place, *part.key, threshold(part.probability)),
            *(bits(1 / (1 - part.probability)), bits(scales[part.adapter])),
        )
    ]


def sent(device: torch.device, *tables: list[int]) -> list[Tensor]:
    """Tables on the device, by one copy, each at a multiple of 16 bytes; torch does not wait for the device."""
    padded = [table + [0] * (len(table) % 2) for table in tables]
    together = torch.tensor([value for table in padded for value in table], dtype=torch.int64, device="cpu")
    return list(torch.split(together.to(device, non_blocking=True), [len(table) for table in padded]))


class Slices:
    """Where slices of the factors' gradients go: straight to the gradient if it has one, else beside each other.

    Attributes:
        rows: the pieces of rows whose slices these are.
        grads: the gradient of each adapter, float32 [rank, columns]; without values yet.
        places: the address of each piece's slice.
        sums: the table of sums that are left to form.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rows: Sequence[Rows],
        ranks: Sequence[int],
        columns: int,
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.grads = [torch.empty(rank, columns, dtype=torch.float32, device=device) for rank in ranks]
        owners = [parts[piece.part].adapter for piece in rows]
        counts = [0] * len(ranks)
        for owner in owners:
            counts[owner] += 1
        distances = [-(rank * columns // -4) * 4 for rank in ranks]
        sizes = [
            distance * count if count > 1 else 0 for distance, count in zip(distances, counts, strict=True)
        ]
        self._space = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        starts = [self._space.data_ptr() + 4 * start for start in accumulate(sizes, initial=0)]
        targets = [grad.data_ptr() for grad in self.grads]
        self.sums = [
            value
            for owner, count in enumerate(counts)
            if count != 1
            for value in (starts[owner], targets[owner], count, ranks[owner] * columns, distances[owner])
        ]
        following = [
            start if count > 1 else target
            for start, target, count in zip(starts, targets, counts, strict=False)
        ]
        self.places = []
        for owner in owners:
            self.places.append(following[owner])
            following[owner] += 4 * distances[owner]
