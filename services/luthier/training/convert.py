"""Between the wire and the values that both families of this service have."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from luthier.errors import FieldViolation, InvalidArgument

E = TypeVar("E", bound=StrEnum)


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


def set_time(timestamp: Any, time: datetime | None) -> None:
    """Fill a Timestamp message; None leaves it unset."""
    if time is not None:
        timestamp.FromDatetime(time.astimezone(UTC).replace(tzinfo=None))
