"""Tokenizers of models that are registered, merged and exported, read in limited forks of the process that does it.

A process that is started would import transformers first, for seconds of a processor at each; the one that forks has
imported it, or was forked from one that had.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

from luthier.errors import InvalidArgument, Reason
from luthier.lm.apart import Apart
from luthier.storage.disk import found_full
from luthier.work import control_groups
from luthier.work.child_ends import End
from luthier.work.limited import Check, LimitReached, ProcessBroken, ProcessKilled
from luthier.work.limited_child import Limits
from luthier.work.limited_fork import in_fork

LIMITS = Limits(cpu_seconds=180, memory_bytes=4 << 30, wall_seconds=900.0)
"""What all that is read of a tokenizer at once may take: docs/operations.md has what one of 250,000 tokens does."""


def tokenizers_apart(scratch: Path, check: Check) -> Apart:
    """Return what runs work in limited forks, which write into a folder; the thread that calls waits.

    What it returns raises what the work raised, and `check`, which is called ten times a second meanwhile.

    Raises:
        InvalidArgument: MODEL_INVALID; it took more than a limit allows, or failed in a way that nobody foresaw.
        Unavailable: CRASHED; it was killed from outside, or there could be no other process.
        ResourceExhausted: OUT_OF_MEMORY, the kernel ended it; DISK_FULL.
        MemoryError: there was none for another process.
    """

    def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        kills_before = control_groups.oom_kills()
        try:
            return in_fork(lambda: _named(work, scratch), LIMITS, check)
        except LimitReached as error:
            raise _invalid(f"the model's tokenizer takes more than {error}") from error
        except ProcessBroken as error:
            raise _invalid(f"the model's tokenizer fails: {error}") from error
        except ProcessKilled as error:
            kills = control_groups.oom_kills() - kills_before
            raise End(code=-SIGKILL, oom_kills=kills, peak_bytes=0).error() from error

    return apart


def _named(work: Callable[[], dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """Do the work; what comes back of an error is its text alone, by which nobody could tell that a disk is full."""
    try:
        return work()
    except Exception as error:
        if full := found_full(error, scratch):
            raise full from error
        raise


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
