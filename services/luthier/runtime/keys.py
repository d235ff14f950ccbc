"""Key files in the home directory: made at first start, readable by their owner alone."""

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from luthier.errors import FailedPrecondition, NotFound, Reason

API_KEY_FILE = "api-key"
WORKER_KEY_FILE = "worker-key"
TOKEN_SECRET_FILE = "token-secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The secrets of one home: never printed, not even by `repr`."""

    api_key: str = field(repr=False)
    worker_key: str = field(repr=False)
    token_secret: str = field(repr=False)


def read_or_create_keys(home: Path) -> Keys:
    """Return the keys of a home; make those that are missing. Processes that start together agree on them.

    Raises FailedPrecondition when others than the owner may read a key file.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Keys(
        api_key=read_or_create_key(home / API_KEY_FILE, "lk"),
        worker_key=read_or_create_key(home / WORKER_KEY_FILE, "lw"),
        token_secret=read_or_create_key(home / TOKEN_SECRET_FILE, "ls"),
    )


def read_key(path: Path) -> str:
    """Return the key in a file.

    Raises NotFound when there is none, FailedPrecondition when others than the owner may read it or it is empty.
    """
    key = read_private(path).strip()
    if not key:
        raise FailedPrecondition(f"{path} must hold a key, got an empty file", metadata={"path": str(path)})
    return key


def read_private(path: Path) -> str:
    """Return a file's text.

    Raises NotFound; FailedPrecondition when others than the owner may read it, and when this process cannot.
    """
    try:
        return _read_private(path)
    except FileNotFoundError:
        raise NotFound(f"there is no key file {path}", reason=Reason.CREDENTIALS_MISSING) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FailedPrecondition(
            f"{path} must be a file of text that user {os.geteuid()} may read, and no link: {_why(path, error)}",
            metadata={"path": str(path)},
        ) from error


def _why(path: Path, error: OSError | UnicodeDecodeError) -> str:
    try:
        status = path.lstat()
    except OSError:
        return str(error)
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link, put the file itself there"
    return f"{error}; it belongs to user {status.st_uid}"


def _read_private(path: Path) -> str:
    # What is no file may keep who opens it waiting, as a pipe does.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor) as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise FailedPrecondition(
                f"{path} must be readable by its owner alone (mode 0600), got mode {mode:04o}; run chmod 600 {path}",
                metadata={"path": str(path)},
            )
        return file.read()


def read_or_create_key(path: Path, kind: str) -> str:
    """Return the key in a file; make one that begins with `kind` where there is none. Raises as `read_key`."""
    if not path.exists():
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{kind}_{secrets.token_urlsafe(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, never replaces the key that another process has just put there.
            os.link(aside, path)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    return read_key(path)
