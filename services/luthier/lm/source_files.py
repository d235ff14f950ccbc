"""Open what models are read from: regular files with one name, on a path without links, of bounded size and number.

A model's folder belongs to whoever asks for the registration. A link in it would read what that person may not
read, a FIFO would hold the worker for ever, and a file could be exchanged between the check and the reading. So
every file is opened here, checked by its descriptor, and read from nothing but that descriptor: libraries that open
files by name get a folder of our own, with copies of the small files and links to the descriptors of the large.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.lm.made import GENERATION_CONFIG

MIB = 1 << 20
COPIED_FILES = {
    "config.json": MIB,
    GENERATION_CONFIG: MIB,
    "tokenizer.json": 256 * MIB,
    "tokenizer_config.json": 16 * MIB,
    "special_tokens_map.json": 16 * MIB,
    "added_tokens.json": 16 * MIB,
    "chat_template.jinja": MIB,
    "vocab.json": 64 * MIB,
    "merges.txt": 64 * MIB,
    "tokenizer.model": 64 * MIB,
    "tekken.json": 64 * MIB,
}
"""What is read of a model's folder beside its weights, and the most bytes that each may have."""
MAX_INDEX_BYTES = 16 * MIB
MAX_ENTRIES = 10_000
"""The most names that a model's folder may hold, those in its subfolders included."""
MAX_DEPTH = 16

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
_UNSAFE_SUFFIXES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".joblib",
    ".npy",
    ".npz",
)
PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""Errors of a disk, or of the network to it, after which the same may well succeed a moment later."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Without O_NONBLOCK the opening of a FIFO waits for its writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(slots=True)
class _Folder:
    """A model's folder while it is staged: where it is laid out, what is open, and how many names were seen."""

    target: Path
    open_files: ExitStack
    seen: int = 0


def has_control_characters(path: str) -> bool:
    """Tell whether a path holds characters that no file of a model needs and no message should print."""
    return _CONTROL.search(path) is not None


@contextmanager
def staged_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """Lay out what a model is read from, of the folder `path`, in a folder below `scratch`, while a block runs.

    Of subfolders nothing is taken; those whose names begin with a dot are passed over, others are checked by the
    same rule.

    Raises:
        NotFound: there is no such folder.
        InvalidArgument: UNSAFE_MODEL_FILE, a link, a file with several names, a FIFO or another thing that is no
            file, pickles; MODEL_INVALID, too large, too many or not to be read.
        Unavailable: its disk does not answer just now.
    """
    with ExitStack() as open_files, _new_folder(scratch) as target:
        folder = _Folder(target, open_files)
        with _passing_told(path):
            descriptor = _open(
                path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, "model directory"
            )
            open_files.callback(os.close, descriptor)
            _take_entries(folder, descriptor, "", depth=0)
        yield target


@contextmanager
def staged_file(path: Path, scratch: Path) -> Iterator[Path]:
    """Lay one large file out alone, under its own name, in a folder below `scratch`, while a block runs.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: as `staged_folder`.
    """
    with _passing_told(path):
        descriptor = _open(path, _READ, "GGUF file")
    try:
        _require_plain(os.fstat(descriptor), path.name)
        with _new_folder(scratch) as target:
            place = target / path.name
            place.symlink_to(f"/proc/self/fd/{descriptor}")
            yield place
    finally:
        os.close(descriptor)


@contextmanager
def _passing_told(path: Path) -> Iterator[None]:
    """Say of what may well be read a moment later that it is not there just now."""
    try:
        yield
    except OSError as error:
        if error.errno not in PASSING:
            raise
        raise Unavailable(f"{path.name} cannot be read just now: {error.strerror}") from error


@contextmanager
def _new_folder(scratch: Path) -> Iterator[Path]:
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="source-") as folder:
        yield Path(folder)


def _take_entries(folder: _Folder, descriptor: int, above: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _invalid(f"a model directory must be at most {MAX_DEPTH} folders deep, {above} is deeper")
    with os.scandir(descriptor) as entries:
        names = []
        for entry in entries:
            names.append(entry.name)
            folder.seen += 1
            if folder.seen > MAX_ENTRIES:
                raise _invalid(f"a model directory must hold at most {MAX_ENTRIES} names, there are more")
    for name in sorted(names):
        _take(folder, descriptor, name, above + name, depth)


def _take(folder: _Folder, descriptor: int, name: str, shown: str, depth: int) -> None:
    there = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    if stat.S_ISDIR(there.st_mode):
        if not name.startswith("."):
            inner = _open_at(
                descriptor, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, shown
            )
            try:
                _take_entries(folder, inner, f"{shown}/", depth + 1)
            finally:
                os.close(inner)
        return
    _require_plain(there, shown)
    if depth > 0:
        return
    if Path(name).suffix.lower() in _UNSAFE_SUFFIXES:
        raise _unsafe(f"weights must be safetensors; {shown} is of a kind that can run code when loaded")
    limit = MAX_INDEX_BYTES if name.endswith(INDEX_SUFFIX) else COPIED_FILES.get(name)
    if limit is None and not name.endswith(WEIGHTS_SUFFIX):
        return
    opened = _open_at(descriptor, name, _READ, shown)
    folder.open_files.callback(os.close, opened)
    # By the descriptor: the name may stand for another file by now.
    status = os.fstat(opened)
    _require_plain(status, shown)
    if limit is None:
        (folder.target / name).symlink_to(f"/proc/self/fd/{opened}")
        return
    (folder.target / name).write_bytes(_contents(opened, shown, limit))


def _contents(descriptor: int, shown: str, limit: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise _invalid(f"{shown} must have at most {limit} bytes, it has more")
    return data


def _open(path: Path, flags: int, what: str) -> int:
    """Open the end of an absolute path, passing through its folders one by one and through no link."""
    if not path.is_absolute() or ".." in path.parts or has_control_characters(str(path)):
        raise _unsafe(f"a model must be named by its real path, got {str(path)!r}")
    passed = os.open("/", _PASS)
    try:
        for part in path.parts[1:-1]:
            inner = _open_at(passed, part, _PASS, path.name, what)
            os.close(passed)
            passed = inner
        return _open_at(passed, path.name, flags, path.name, what)
    finally:
        os.close(passed)


def _open_at(descriptor: int, name: str, flags: int, shown: str, what: str = "file") -> int:
    try:
        return os.open(name, flags, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(descriptor, name):
            raise _unsafe(
                f"a model must be named by its real path, {shown} is a symbolic link or lies below one"
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFound(f"there is no {what} {shown}") from error
        if error.errno in PASSING:
            raise
        raise _invalid(f"{shown} must be readable by the worker: {error.strerror}") from error


def _is_link(descriptor: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _require_plain(status: os.stat_result, shown: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of another kind")
        raise _unsafe(f"a model must be made of plain files, {shown} is {kind}")
    if status.st_nlink != 1:
        raise _unsafe(
            f"a model must be made of plain files, {shown} has {status.st_nlink} names (hard links); copy it instead"
        )


def _unsafe(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.UNSAFE_MODEL_FILE)


def _invalid(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason=Reason.MODEL_INVALID)
