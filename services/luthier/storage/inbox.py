"""Files that a blob store takes from its own folder: who sees that folder leaves a copy there, and sends no bytes.

The store shows a mark, a file whose name nobody guesses. Who sees the mark sees the folder, on one machine or on a
shared file system; who does not is elsewhere. A copy stands beside the mark, locked by who made it.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from luthier.errors import FieldViolation, InvalidArgument, NotFound, Reason

_NAME = re.compile(r"[0-9a-f]{32}")
_NOT_IN_THE_KERNEL = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
"""File systems between which the kernel does not copy by itself."""


@contextmanager
def place_beside(mark: Path) -> Iterator[IO[bytes] | None]:
    """Give a new file beside a mark for the length of a block, and remove it then unless it has been taken.

    None: the mark is not here, or nothing may be written beside it.
    """
    if not mark.is_file():
        yield None
        return
    path = mark.with_name(uuid.uuid4().hex)
    try:
        file = path.open("xb", buffering=0)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        path.unlink(missing_ok=True)
        file.close()


def copy_into(file: IO[bytes], source: Path) -> bool:
    """Copy a whole file into an empty one, in the kernel where it can; False: no room, or nothing to read."""
    try:
        with source.open("rb", buffering=0) as whole:
            _copy(whole, file)
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
    # Whose file it is may write to it at any time, also when it is a blob.
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
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


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    left = os.fstat(source.fileno()).st_size
    try:
        while left and (count := os.copy_file_range(source.fileno(), target.fileno(), left)):
            left -= count
    except OSError as error:
        if error.errno not in _NOT_IN_THE_KERNEL:
            raise
        shutil.copyfileobj(source, target, 1 << 20)
