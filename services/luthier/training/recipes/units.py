"""What rows are in their unit, and which units a method learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.training.recipes.batches import RowLength
from luthier.training.recipes.mixture import Mixture, row_listed, row_named

CHOSEN = "chosen"
REJECTED = "rejected"
DESIRABLE = "desirable"
UNDESIRABLE = "undesirable"
MISMATCHED = "mismatched"
PROMPT = "prompt"
ROLES = ("", CHOSEN, REJECTED, DESIRABLE, UNDESIRABLE, MISMATCHED, PROMPT)
"""Every role; a row holds its place here. The first is that of a row that is all of its unit."""

Form = tuple[str, ...]
"""The roles of a unit's rows, in order."""
SINGLE: tuple[Form, ...] = (("",),)
PAIR: tuple[Form, ...] = ((CHOSEN, REJECTED),)
PROMPTS: tuple[Form, ...] = ((PROMPT,),)
UNPAIRED: tuple[Form, ...] = ((DESIRABLE, MISMATCHED), (UNDESIRABLE, MISMATCHED))


def role_codes(names: Sequence[str]) -> NDArray[np.int8]:
    """Return each name's place in `ROLES`.

    Raises:
        DataLoss: there is no such role.
    """
    places = {role: place for place, role in enumerate(ROLES)}
    unknown = sorted(set(names) - places.keys())
    if unknown:
        raise DataLoss(f"a row's role must be one of {ROLES}, got {unknown[0]!r}")
    return np.array([places[name] for name in names], dtype=np.int8)


def require_units(
    lengths: Iterable[RowLength],
    roles: NDArray[np.int8],
    forms: Sequence[Form],
    mixture: Mixture | None = None,
) -> None:
    """Check that every unit has one of the forms, and something to learn in each row or in none.

    Args:
        lengths: all rows of a split.
        roles: of each of them, as its place in `ROLES`.
        forms: what the method learns from.
        mixture: whose rows these are, where they are of several renderings.

    Raises:
        FailedPrecondition: ROWS_NOT_OF_METHOD, or NO_SUPERVISED_TOKENS where one row of a unit has none; the row is
            named.
    """
    numbered = zip(lengths, roles.tolist(), strict=True)
    for unit, group in groupby(numbered, key=lambda one: one[0].row if one[0].unit is None else one[0].unit):
        members = tuple(group)
        found = tuple(ROLES[role] for _, role in members)
        if found not in forms:
            raise FailedPrecondition(
                f"each unit of rows must be {_words(forms)}, that of row {row_named(unit, mixture)} is "
                f"{_words([found])}; the rendering is of another kind than the job's method learns from",
                reason=Reason.ROWS_NOT_OF_METHOD,
                metadata={**row_listed(unit, mixture), "roles": ",".join(found)},
            )
        empty = [row.row for row, _ in members if row.num_supervised == 0]
        if empty and len(empty) < len(members):
            raise FailedPrecondition(
                f"each row of a unit must have a learnt token, row {row_named(empty[0], mixture)} of the unit of row "
                f"{row_named(unit, mixture)} has none",
                reason=Reason.NO_SUPERVISED_TOKENS,
                metadata=row_listed(empty[0], mixture),
            )


def _words(forms: Sequence[Form]) -> str:
    return " or ".join(
        "a single row" if form == ("",) else " + ".join(role or "none" for role in form) for form in forms
    )
