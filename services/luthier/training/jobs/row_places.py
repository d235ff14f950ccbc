"""Which record is too long: what a refusal says of a row, which only who has the rows knows."""

from __future__ import annotations

from typing import Protocol

from luthier.errors import LuthierError, Reason


class RowPlaces(Protocol):
    """Where rows are from."""

    async def place(self, name: str, row: int) -> str:
        """Return the file and the line of a row of a READY rendering, `file:line`."""
        ...


async def placed(error: LuthierError, rendering: str, places: RowPlaces) -> LuthierError:
    """Return a refusal of a row for its length with the place of that row; what it was where nobody can say it.

    The row is one of `rendering`, unless the refusal says of which it is.
    """
    row = error.metadata.get("rows", "").partition(",")[0]
    if error.reason != Reason.SEQUENCE_TOO_LONG or not row:
        return error
    try:
        place = await places.place(error.metadata.get("rendering", rendering), int(row))
    except LuthierError:
        return error
    return error.amended(f"the longest is {place}", {"places": place})
