"""Whether there is memory for one more base model on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from luthier.work.machine import available_bytes

_BESIDE_BYTES = 2 << 30
"""What a process takes beside its model's weights: libraries, and caches of what it generates."""
_CACHES_SHARE = 0.5
"""What is left free for the caches of a large model, as a part of its weights."""
_SHORT_SHARE = 0.05
_SHORT_BYTES = 4 << 30
"""Memory is short where less than that part of the machine's, and than so much, is left."""


def fits_in_memory(needed_bytes: int, held_bytes: int) -> bool:
    """Tell whether a model fits beside others.

    Weights of those that are held may be mapped files, which the kernel counts as available; they are needed all the
    same.
    """
    available = available_bytes()
    beside_bytes = max(_BESIDE_BYTES, int(_CACHES_SHARE * needed_bytes))
    return available is not None and needed_bytes + beside_bytes <= available - held_bytes


def memory_is_short() -> bool:
    """Tell whether who holds memory that nobody uses should let go of it."""
    available = available_bytes()
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return available is not None and available < min(_SHORT_BYTES, int(_SHORT_SHARE * whole))


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is known of the room for base models.

    Attributes:
        fits: tells whether a model whose files have so many bytes fits beside those that are held, whose files have so
            many.
        is_short: tells whether models that nobody uses should leave.
    """

    fits: Callable[[int, int], bool] = fits_in_memory
    is_short: Callable[[], bool] = memory_is_short
