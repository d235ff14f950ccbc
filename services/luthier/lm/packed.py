"""Padding-free batches: sequences laid end to end in one row of T tokens.

Shape suffixes: T tokens of the whole batch, S sequences, N positions that predict a named token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from luthier.errors import InvalidArgument

WEIGHT = "weight"
"""Name of the stream that says how much each token is learnt; a loss mask is 0 and 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """S sequences in one row.

    `input_ids` and `position_ids` [T] (restarting at 0 with each sequence) are int64. `streams` hold one float32 a
    token [T] each, by name. `cu_seqlens` holds the S + 1 boundaries: sequence i is `[cu_seqlens[i], cu_seqlens[i +
    1])`. Boundaries are plain ints, so that no layer waits for the device. `rows` are the sequences' numbers, by
    which dropout knows them in whatever batch they come. `roles` say what each sequence is in its unit, "" where it is
    all of it. A batch that does not count passes through the model because other ranks wait for that, and adds nothing.
    """

    input_ids: Tensor
    position_ids: Tensor
    streams: Mapping[str, Tensor]
    cu_seqlens: tuple[int, ...]
    rows: tuple[int, ...]
    roles: tuple[str, ...]
    counts: bool = True

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            streams={name: stream.to(device) for name, stream in self.streams.items()},
        )


def pack(
    ids: Sequence[ArrayLike],
    streams: Mapping[str, Sequence[ArrayLike]],
    rows: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
) -> PackedBatch:
    """Lay sequences of token ids end to end, and with them the sequences' values in each stream.

    `rows` are the numbers of the sequences, by default 0, 1, 2 and so on; `roles` are "" by default.

    Raises:
        InvalidArgument: no sequence, an empty one, or a stream of another length.
    """
    if not ids:
        raise InvalidArgument("a packed batch needs at least one sequence, got none")
    parts = [np.asarray(one, dtype=np.int64) for one in ids]
    laid = {name: [np.asarray(one, dtype=np.float32) for one in stream] for name, stream in streams.items()}
    lengths = [len(part) for part in parts]
    for index, length in enumerate(lengths):
        found = {name: len(stream[index]) for name, stream in laid.items()}
        if length == 0 or set(found.values()) - {length}:
            raise InvalidArgument(
                f"sequence {index} must have at least one token and a value for each in every stream, got "
                f"{length} tokens and {found} values"
            )
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(parts)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        streams={name: torch.from_numpy(np.concatenate(stream)) for name, stream in laid.items()},
        cu_seqlens=(0, *np.cumsum(lengths).tolist()),
        rows=tuple(range(len(ids)) if rows is None else rows),
        roles=tuple("" for _ in ids) if roles is None else tuple(roles),
    )


def named_positions(batch: PackedBatch, *streams: str) -> Tensor:
    """Positions [N] whose next token, in the same sequence, is not 0 in one of the streams; ascending.

    The first token of a sequence has nothing before it to predict it, and is never named.
    """
    is_named = torch.stack([batch.streams[name] != 0 for name in streams]).any(dim=0)
    next_named = torch.zeros_like(is_named)
    next_named[:-1] = is_named[1:]
    last = torch.tensor(batch.cu_seqlens[1:], device=next_named.device) - 1
    next_named[last] = False
    return next_named.nonzero().squeeze(1)
