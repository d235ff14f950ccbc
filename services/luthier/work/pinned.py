"""What a task was made with must still be what its name means: the name of what was deleted may be used again."""

from __future__ import annotations

from luthier.errors import DataLoss, Reason


def require_pinned(name: str, wanted: str, found: str) -> None:
    """Raise DataLoss CHECKSUM_MISMATCH unless the resource of a name has the digest that was pinned."""
    if found == wanted:
        return
    raise DataLoss(
        f"{name} must have digest {wanted} as when this was created, it has {found or 'none'}: it was deleted and its "
        f"name used again; create this again for what {name} is now",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"name": name, "expected": wanted, "actual": found},
    )
