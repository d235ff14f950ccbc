"""Shards: the Parquet files of a version or rendering, in row order.

A shard is one file: its blob, and the rows `first_row` .. `first_row + num_rows - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.errors import FieldViolation, InvalidArgument, OutOfRange
from luthier.worker.v1.task_pb2 import Shard


def num_rows(shards: Sequence[Shard]) -> int:
    """Return how many rows the shards hold together."""
    return shards[-1].first_row + shards[-1].num_rows if shards else 0


def check_contiguous(shards: Sequence[Shard]) -> None:
    """Raise InvalidArgument unless each shard begins where the one before it ends, the first at row 0."""
    expected = 0
    for index, shard in enumerate(shards):
        if shard.first_row != expected or shard.num_rows < 1:
            raise InvalidArgument.of_fields(
                FieldViolation(
                    field=f"shards[{index}]",
                    description=f"must hold at least one row from row {expected} on, got {shard.num_rows} "
                    f"rows from row {shard.first_row} on",
                )
            )
        expected += shard.num_rows


def check_start_row(start_row: int, shards: Sequence[Shard]) -> None:
    """Raise OutOfRange unless a stream can begin at `start_row`; the end itself gives an empty stream."""
    end = num_rows(shards)
    if not 0 <= start_row <= end:
        raise OutOfRange(
            f"start_row must be in 0..{end}, got {start_row}",
            metadata={"start_row": str(start_row), "num_rows": str(end)},
        )
