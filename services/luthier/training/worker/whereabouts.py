"""What a failure says of where a run was: the step, and the rows of the pass that it made. No torch, no gRPC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import Cancelled, LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.training.recipes.mixture import places_listed, places_named
from luthier.training.recipes.position import FILE_NAME, NAMED_ROWS, Position, noted

_OF_PASSES = frozenset({Reason.OUT_OF_MEMORY, Reason.CRASHED, Reason.STALLED, Reason.RANK_LOST})
"""Of what is tried again, or wants room: what may be of the rows at hand."""
_NAMING = frozenset({"row", "rows", "filename"})
"""Metadata of failures that name rows themselves."""


@contextmanager
def pass_named(scratch: Path, renderings: Sequence[str]) -> Iterator[None]:
    """Let a failure that names no row name the step and the rows at hand, as the run's processes have noted them.

    Args:
        scratch: the folder of the run, or of one of its ranks.
        renderings: the job's, its own first.
    """
    try:
        yield
    except LuthierError as error:
        found = _noted(scratch, error.metadata.get("rank", ""))
        if not found or not _is_of_a_pass(error):
            raise
        raise error.amended(*_told(found, renderings)) from error


def _is_of_a_pass(error: LuthierError) -> bool:
    if isinstance(error, Cancelled) or error.reason == Reason.LEASE_LOST or _NAMING & error.metadata.keys():
        return False
    return not isinstance(error, Unavailable | ResourceExhausted) or error.reason in _OF_PASSES


def _noted(scratch: Path, ranks: str) -> list[Position]:
    """Return where a run's processes were: the ranks that are said to be at fault, else all of them."""
    folders = [scratch]
    if not (scratch / FILE_NAME).exists():
        named = [scratch / f"rank-{rank}" for rank in ranks.split(",") if rank]
        folders = named or sorted(scratch.glob("rank-*"))
    found = (noted(folder / FILE_NAME) for folder in folders)
    return [one for one in found if one is not None]


def _told(found: Sequence[Position], renderings: Sequence[str]) -> tuple[str, dict[str, str]]:
    step = max(one.step for one in found)
    at_hand = [one for one in found if one.step == step]
    rows = [row for one in at_hand for row in one.rows][:NAMED_ROWS]
    num_rows = sum(one.num_rows for one in at_hand)
    places = [(renderings[source], row) for source, row in rows]
    numbers = [row for _, row in rows]
    is_mixed = len(renderings) > 1
    named = places_named(places) if is_mixed else ", ".join(map(str, numbers))
    more = f" and {num_rows - len(rows)} more" if num_rows > len(rows) else ""
    when = f"at step {step}" if step else "before the first step of the attempt"
    listed = places_listed(places) if is_mixed else {"rows": ",".join(map(str, numbers))}
    return f"it was {when}, in a pass over rows {named}{more}", {
        "step": str(step),
        **listed,
        "num_rows": str(num_rows),
    }
