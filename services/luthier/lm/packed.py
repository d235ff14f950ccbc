"""Padding-free batches: sequences laid end to end in one row of T tokens.

Shape suffixes: T tokens of the whole batch, S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """S sequences in one row.

    `input_ids` and `position_ids` [T] (restarting at 0 with each sequence) are int64, `supervised` [T] says
    which tokens the model is taught to produce, `cu_seqlens` holds the S + 1 boundaries: sequence i is
    `[cu_seqlens[i], cu_seqlens[i + 1])`. Boundaries are plain ints, so that no layer waits for the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    supervised: Tensor
    cu_seqlens: tuple[int, ...]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            supervised=self.supervised.to(device),
            cu_seqlens=self.cu_seqlens,
        )


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> PackedBatch:
    """Lay (token ids, supervised flags) pairs end to end.

    Raises:
        InvalidArgument: no sequence, an empty one, or ids and flags of different lengths.
    """
    if not sequences:
        raise InvalidArgument("a packed batch needs at least one sequence, got none")
    bounds = [0]
    for index, (ids, flags) in enumerate(sequences):
        if not ids or len(ids) != len(flags):
            raise InvalidArgument(
                f"sequence {index} must have as many flags as tokens and at least one, "
                f"got {len(ids)} tokens and {len(flags)} flags"
            )
        bounds.append(bounds[-1] + len(ids))
    return PackedBatch(
        input_ids=torch.tensor([token for ids, _ in sequences for token in ids], dtype=torch.long),
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in sequences]),
        supervised=torch.tensor([flag for _, flags in sequences for flag in flags], dtype=torch.bool),
        cu_seqlens=tuple(bounds),
    )
