"""Whose fault it is that an attempt failed, by its reason."""

from __future__ import annotations

from luthier.errors import Reason

SERVICE_FAULTS = frozenset(
    {
        Reason.CHECKSUM_MISMATCH,
        Reason.CRASHED,
        Reason.DATA_CORRUPTED,
        Reason.INTERNAL,
        Reason.PEER_REFUSED,
        Reason.RANK_LOST,
        Reason.RANKS_DIVERGED,
        Reason.SERVICE_UNAVAILABLE,
        Reason.STALLED,
        Reason.TOO_FEW_RANKS,
        Reason.WORKER_LOST,
    }
)
"""Reasons of failures that whoever asked for the work can do nothing about. OUT_OF_MEMORY is none: the work was too
large for the machine, and says so."""
ONLY_TIME_MENDS = frozenset({Reason.DISK_FULL, Reason.OVERLOADED, Reason.PEER_REFUSED})
"""Reasons to give a task back and take none for a while: no room, an overload, a peer that refuses us."""
GIVEN_BACK = ONLY_TIME_MENDS | {Reason.SHUTTING_DOWN}
"""Reasons of attempts that are given back: the task goes on later, and nothing is counted against it."""
ATTEMPT_FAULTS = SERVICE_FAULTS - GIVEN_BACK
"""Reasons that make an attempt an error in its trace."""
