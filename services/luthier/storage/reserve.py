"""Room for writes on a disk that others have filled: SQLite's log of writes, kept from one run to the next.

<database>-wal        the log: SQLite begins anew in it once it holds 4 MiB, what is beyond is free on a full disk, too
<database>-shm        its index, of 32 KiB
<database>-kept-wal   the log between two runs, without the header that makes it one
<database>-kept-shm   its index likewise

With its last connection SQLite has all that is in the log in the database, and deletes log and index. Each gets a
second name before that: what has no other name afterwards is nobody's log any more, and its room is not given back.
Before the next run's first connection both get their names again. So no byte of them is free at any time, whoever waits
for one.

What is in a log whose header is no longer valid is never read again, only overwritten.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from luthier.storage.dialect import RESERVED_BYTES, grow_log, open_lasting, unusable, url_of
from luthier.storage.disk import Disk
from luthier.storage.files import is_at, sync_directory

_BLANK_BYTES = 4096
"""What is made zero of a log: its header, and the first frame behind it."""
_INDEX_BYTES = 32 << 10
"""What SQLite wants of an index at least."""
_SCARCE_BYTES = 64 << 20
"""What is free may be gone a moment later, when SQLite opens the index."""
_USED_BYTE = 128
"""Of an index: locked by everybody who uses it. Who comes first cuts it to nothing, and lets it grow again."""
_FLOCK = "hhqqi4x"
_logger = logging.getLogger(__name__)


class Reserve:
    """The room that one database has for writes on a full disk. Blocking; for one thread at a time."""

    def __init__(self, database: Path, disk: Disk) -> None:
        self._database = database
        self._disk = disk
        self._log, self._kept_log = self._beside("wal"), self._beside("kept-wal")
        self._index, self._kept_index = self._beside("shm"), self._beside("kept-shm")
        self._connection: Connection | None = None
        self._files = ExitStack()

    def _beside(self, name: str) -> Path:
        return self._database.with_name(f"{self._database.name}-{name}")

    def take(self) -> None:
        """Have the room: what was kept, else of the disk. Call it before this process connects to the database.

        A connection stays open until `keep`: with the last one the log would go. Does nothing for a file that cannot
        be a database, which its next user says better.

        Raises:
            ResourceExhausted: DISK_FULL; nothing was kept, and there is no room.
        """
        self._put_back()
        index = _in_use(self._index) if self._disk.free_bytes() < _SCARCE_BYTES else None
        if index is not None:
            self._files.callback(os.close, index)
        try:
            self._connection = open_lasting(url_of(self._database))
        except DBAPIError as error:
            if not unusable(error.orig):
                raise
            return
        if not _is_whole(self._log):
            grow_log(self._connection)

    def keep(self) -> None:
        """Keep the room for the next run. Call it when everybody else of this process has closed what they had.

        Whoever uses the database still, another process or a connection that waits for garbage to be collected, goes on
        with the log, and has it deleted in the end: what is kept stays then, too.
        """
        if self._connection is not None:
            try:
                self._close(self._connection)
            except OSError as error:
                _logger.warning("no room is kept for a start on a full disk: %s", error)
            self._connection = None
        # With a descriptor all locks go that this process has on a file: not while somebody here may have some.
        if not self._index.exists():
            self._files.close()

    def _close(self, connection: Connection) -> None:
        try:
            if _is_whole(self._log):
                self._name()
        finally:
            connection.close()
            for kept, there in ((self._kept_log, self._log), (self._kept_index, self._index)):
                # What somebody uses stays as it is with both names: the next start sees what has become of it.
                with _blanked(kept, there):
                    pass
            sync_directory(self._database.parent)

    def drop(self) -> None:
        """Give back what was kept."""
        self._kept_log.unlink(missing_ok=True)
        self._kept_index.unlink(missing_ok=True)

    def _name(self) -> None:
        for there, kept in ((self._log, self._kept_log), (self._index, self._kept_index)):
            kept.unlink(missing_ok=True)
            os.link(there, kept)

    def _put_back(self) -> None:
        """Give what was kept its name again. What cannot have it stays where it is."""
        try:
            try:
                _rename(self._kept_log, self._log, is_wanted=_is_whole(self._kept_log))
                _rename(self._kept_index, self._index)
            finally:
                sync_directory(self._database.parent)
        except OSError as error:
            _logger.warning("what was kept for a start on a full disk is not all used: %s", error)


def _rename(kept: Path, there: Path, *, is_wanted: bool = True) -> None:
    """Give what was kept the name of a log or an index, unless there is one; then, or not wanted, it goes."""
    with _blanked(kept, there) as is_ours:
        if is_ours and is_wanted:
            # Unlike a rename it never takes the place of another file.
            with suppress(FileExistsError):
                os.link(kept, there)
        kept.unlink(missing_ok=True)


def _is_whole(log: Path) -> bool:
    """Tell whether a log has all the room: a copy may have been made without the blocks that are zero."""
    try:
        status = log.stat()
    except FileNotFoundError:
        return False
    return min(status.st_size, status.st_blocks * 512) >= RESERVED_BYTES


@contextmanager
def _blanked(path: Path, there: Path) -> Iterator[bool]:
    """Make a file that is nobody's log, as it has this name alone, no log durably. It is locked for the block's length.

    Yields whether it is so: of one that has another name, or while there is a log or an index, nothing is changed. (Not
    every file system counts names.)
    """
    if not _is_single(path) or there.exists():
        # Not even opened: with the descriptor the locks would go that this process has on it.
        yield False
        return
    with path.open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have put it back meanwhile.
        is_ours = _is_single(path) and is_at(file, path) and not there.exists()
        if is_ours:
            size_bytes = os.fstat(file.fileno()).st_size
            os.ftruncate(file.fileno(), min(size_bytes, RESERVED_BYTES))
            os.pwrite(file.fileno(), bytes(min(size_bytes, _BLANK_BYTES)), 0)
            os.fsync(file.fileno())
        yield is_ours


def _is_single(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _in_use(index: Path) -> int | None:
    """Have an index that nobody uses be used, and empty, so that no first user gives its room back; None: it cannot be.

    Returns a descriptor, to be closed when this process has no connection any more. What SQLite does with an index that
    it finds is done here: under the same lock it is emptied, by zeros, which keep its room.
    """
    if _is_open_here(index):
        return None
    try:
        descriptor = os.open(index, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        _lock(descriptor, fcntl.F_WRLCK)
        blank = bytes(max(os.fstat(descriptor).st_size, _INDEX_BYTES))
        # A copy may lack its zeros, and their room be taken: SQLite, which maps it, would be ended by writing there.
        is_whole = os.pwrite(descriptor, blank, 0) == len(blank)
        _lock(descriptor, fcntl.F_RDLCK)
    except OSError:
        is_whole = False
    if is_whole:
        return descriptor
    os.close(descriptor)
    return None


def _is_open_here(path: Path) -> bool:
    """Tell whether this process has a file open: with another descriptor all of its locks on the file would go."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of this listing is closed by then
            if descriptor.samefile(path):
                return True
    return False


def _lock(descriptor: int, kind: int) -> None:
    """Lock as SQLite does, but by the open file: its own locks are the process's, which would not see one another."""
    lock = struct.pack(_FLOCK, kind, os.SEEK_SET, _USED_BYTE, 1, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
