"""Between the wire and the values that every family of this service has."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar

from luthier.data.shards import Shard
from luthier.data.splits import Split
from luthier.errors import FieldViolation, InvalidArgument
from luthier.v1 import dataset_pb2
from luthier.worker.v1 import task_pb2

E = TypeVar("E", bound=StrEnum)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def enum_from_proto(type_: type[E], wire: Any, prefix: str, number: int, field: str) -> E | None:
    """Return the member that an enum number of the generated enum `wire` stands for, None for 0.

    Raises InvalidArgument for a number that the enum does not have.
    """
    if number == 0:
        return None
    if number not in wire.values():
        known = ", ".join(f"{name} = {value}" for name, value in wire.items() if value)
        description = f"must be one of {known}, got {number}"
        raise InvalidArgument.of_fields(FieldViolation(field=field, description=description))
    return type_(wire.Name(number).removeprefix(prefix))


def split_from_proto(number: int, field: str = "split") -> Split | None:
    """Return a split, None for unset. Raises InvalidArgument for an unknown number."""
    return enum_from_proto(Split, dataset_pb2.Split, "SPLIT_", number, field)


def split_to_proto(split: Split | None) -> dataset_pb2.Split.ValueType:
    """Return a split's enum number, 0 for None."""
    return dataset_pb2.Split.Value(f"SPLIT_{split or 'UNSPECIFIED'}")


def set_time(timestamp: Any, time: datetime) -> None:
    """Fill a Timestamp message."""
    seconds, microseconds = divmod((time - _EPOCH) // _MICROSECOND, 1_000_000)
    timestamp.seconds = seconds
    timestamp.nanos = microseconds * 1000


def shard_from_proto(message: task_pb2.Shard) -> Shard:
    """Read a shard."""
    return Shard(
        path=message.file.path,
        digest=message.file.sha256,
        size_bytes=message.file.size_bytes,
        first_row=message.first_row,
        num_rows=message.num_rows,
    )


def shard_to_proto(shard: Shard) -> task_pb2.Shard:
    """Write a shard."""
    file = task_pb2.BlobFile(path=shard.path, sha256=shard.digest, size_bytes=shard.size_bytes)
    return task_pb2.Shard(file=file, first_row=shard.first_row, num_rows=shard.num_rows)
