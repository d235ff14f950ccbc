"""Room on a disk: the floor below which nothing new begins, and errors of a disk that is full."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import LuthierError, Reason, ResourceExhausted

MIN_FREE_BYTES = 1 << 30
"""Default of the floor: room that new uploads, resources and attempts leave free."""
RESERVE_SHARE = 16
"""Below a 16th of the floor no blob is stored either: what is left is the database's, so that cancelling works."""
NO_ROOM_BYTES = 1 << 20
"""A disk with less than this is one where writing fails."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_RETRY_SECONDS = 30.0
_MIB = 1 << 20


class Disk:
    """The file system that holds a folder, and how much of it stays free. A floor of 0 bytes is no floor."""

    def __init__(self, folder: Path, min_free_bytes: int = 0) -> None:
        self._folder = folder
        self.min_free_bytes = min_free_bytes

    @property
    def reserve(self) -> "Disk":
        """The same disk with the floor that holds for work that has begun."""
        return Disk(self._folder, self.min_free_bytes // RESERVE_SHARE)

    def free_bytes(self) -> int:
        """Return the bytes that a process without privileges may still write."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def has_room(self) -> bool:
        """Tell whether more is free than the floor."""
        return self._has_room(0)

    def _has_room(self, size_bytes: int) -> bool:
        return self.min_free_bytes == 0 or self.free_bytes() >= self.min_free_bytes + size_bytes

    def require_room(self, size_bytes: int = 0) -> None:
        """Raise ResourceExhausted DISK_FULL unless more is free than the floor and what is to be written."""
        if self._has_room(size_bytes):
            return
        free_bytes = self.free_bytes()
        beside = f" beside {size_bytes / _MIB:.1f} MiB that are to be written" if size_bytes else ""
        raise ResourceExhausted(
            f"the disk has {free_bytes / _MIB:.1f} MiB free, and {self.min_free_bytes / _MIB:.1f} MiB must stay "
            f"free{beside}; delete what is not needed, or make room",
            reason=Reason.DISK_FULL,
            metadata={"free_bytes": str(free_bytes), "min_free_bytes": str(self.min_free_bytes)},
            retry_after_seconds=_RETRY_SECONDS,
        )


def disk_full(detail: str) -> ResourceExhausted:
    """Return the error for a write that found no room; `detail` is what the system said."""
    return ResourceExhausted(
        f"the disk is full ({detail}); nothing of this call was stored; make room and call again",
        reason=Reason.DISK_FULL,
        retry_after_seconds=_RETRY_SECONDS,
    )


def is_full(error: BaseException) -> bool:
    """Tell whether an error of the system says that a disk, or a quota of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def found_full(
    error: Exception, folder: Path, tells: Callable[[BaseException], bool] = is_full
) -> ResourceExhausted | None:
    """Return DISK_FULL when that is why work in a folder failed, None when it is not.

    Libraries that write files tell it in words of their own: any of them is believed where no room is left, and those
    that `tells` knows everywhere. An error of our own is why by itself, unless it was raised from one of a full disk.
    """
    has_none = not isinstance(error, LuthierError) and Disk(folder).free_bytes() < NO_ROOM_BYTES
    if has_none or any(map(tells, _causes(error))):
        return disk_full(f"{type(error).__name__}: {error}")
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def named_when_full() -> Iterator[None]:
    """Raise ResourceExhausted DISK_FULL in place of the system's errors of a full disk."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(str(error.strerror)) from error
