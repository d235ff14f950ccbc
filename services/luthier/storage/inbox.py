"""Files that a blob store takes from its own folder: who sees that folder leaves a copy there, and sends no bytes.

The store shows a mark, a file whose name nobody guesses. Who sees the mark sees the folder, on one machine or on a
shared file system; who does not is elsewhere. A copy stands beside the mark, locked by who made it.
"""

import errno
import fcntl
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from luthier.errors import FieldViolation, InvalidArgument, NotFound, Reason
from luthier.storage.disk import Disk, named_when_full
from luthier.storage.files import append, is_at

_NAME = re.compile(r"[0-9a-f]{32}")
_NOT_IN_THE_KERNEL = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
"""File systems between which the kernel does not copy by itself."""
_COPY_BYTES = 4 << 20
"""What is copied between two looks at the room that is left."""


@contextmanager
def place_beside(mark: Path) -> Iterator[IO[bytes] | None]:
    """Give a new file beside a mark for the length of a block, and remove it then unless it has been taken.

    None: the mark is not here or another user's, whose service takes no file of ours; or nothing may be written or
    locked beside it.
    """
    file = _new_beside(mark)
    try:
        yield file
    finally:
        if file is not None:
            _let_go(file)


def copy_into(file: IO[bytes], source: Path, min_free_bytes: int = 0) -> bool:
    """Copy a whole file into an empty one, in the kernel where it can; False: it cannot be read or written.

    Raises:
        ResourceExhausted: DISK_FULL, fewer than `min_free_bytes` would stay free, or there is no room.
    """
    disk = Disk(Path(file.name).parent, min_free_bytes)
    try:
        with source.open("rb", buffering=0) as whole, named_when_full():
            _copy(whole, file, disk)
    except OSError:
        return False
    return True


def open_left(folder: Path, name: str) -> IO[bytes]:
    """Open a file that was left in a folder.

    Raises:
        InvalidArgument: it is no name that a file has that was left.
        NotFound: there is no such file, or it is not a file of this process's own user.
    """
    if not _NAME.fullmatch(name):
        violation = FieldViolation(
            field="left_in_inbox", description=f"must be 32 lowercase hex digits, got {name!r}"
        )
        raise InvalidArgument.of_fields(violation)
    try:
        # Neither another's file by a link, nor a pipe that nobody writes to.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise not_left(name) from error
    status = os.fstat(descriptor)
    if not _is_own(status):
        os.close(descriptor)
        raise not_left(name)
    return os.fdopen(descriptor, "rb")


def not_left(name: str) -> NotFound:
    """Return the error for a copy that was not left."""
    return NotFound(
        f"a file {name!r} of this service's own user must be in its inbox, there is none; send the bytes instead",
        reason=Reason.RESOURCE_NOT_FOUND,
        metadata={"left_in_inbox": name},
    )


def _new_beside(mark: Path) -> IO[bytes] | None:
    try:
        if not _is_own(mark.stat()):
            return None
        # A service that swept the file before it was locked has removed it.
        while not (file := _new_locked(mark.with_name(uuid.uuid4().hex))):
            pass
    except OSError:
        return None
    return file


def _new_locked(path: Path) -> IO[bytes] | None:
    file = path.open("xb", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        is_there = is_at(file, path)
    except OSError:
        _let_go(file)
        raise
    if is_there:
        return file
    file.close()
    return None


def _is_own(status: os.stat_result) -> bool:
    # Whose file it is may write to it at any time, also when it is a blob: a service takes its own user's alone.
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _let_go(file: IO[bytes]) -> None:
    # What stays is swept by the service once it is no longer locked.
    with suppress(OSError):
        Path(file.name).unlink(missing_ok=True)
    with suppress(OSError):
        file.close()


def _copy(source: IO[bytes], target: IO[bytes], disk: Disk) -> None:
    left = os.fstat(source.fileno()).st_size
    while left:
        # Again for every piece: others write too.
        disk.require_room(left)
        count = _copy_piece(source, target, min(left, _COPY_BYTES))
        if not count:
            return
        left -= count


def _copy_piece(source: IO[bytes], target: IO[bytes], size_bytes: int) -> int:
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), size_bytes)
    except OSError as error:
        if error.errno not in _NOT_IN_THE_KERNEL:
            raise
    data = source.read(size_bytes)
    append(target, data)
    return len(data)
