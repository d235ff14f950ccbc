"""A worker's place on this machine: a lock that says which process has it, and a folder of its own."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from luthier.errors import FailedPrecondition, Reason
from luthier.storage.files import try_lock

PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the process that holds a worker's lock has.

    Attributes:
        lock: names the lock; no other process can say the same name at the same time.
        folder: for scratch files of this process; gone when it leaves.
    """

    lock: str
    folder: Path


@contextmanager
def taken_place(work_folder: Path) -> Iterator[Place]:
    """Hold the lock beside `work_folder` for the length of a block, and a new folder in it.

    A process that is about to end is waited for. What ended ones left in the folder is removed: nobody without
    the lock works there, and the kernel gives it up with the process, whichever way it ends.

    Raises:
        FailedPrecondition: WORKER_ID_TAKEN; another process holds it.
    """
    work_folder.parent.mkdir(parents=True, exist_ok=True)
    path = work_folder.with_name(f"{work_folder.name}.lock")
    with _locked(path, work_folder.name) as file:
        shutil.rmtree(work_folder, ignore_errors=True)
        folder = work_folder / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield Place(lock=_name_of(file), folder=folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path, worker_id: str) -> IO[bytes]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    told = False
    while (file := try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise FailedPrecondition(
                f"worker {worker_id!r} runs already on this home: another process holds {path}; give this one a "
                "name of its own (LUTHIER_WORKER_NAME), or stop the other",
                reason=Reason.WORKER_ID_TAKEN,
                metadata={"worker": worker_id},
            )
        if not told:
            _logger.warning("waiting for the worker's former process", extra={"lock": str(path)})
            told = True
        time.sleep(_POLL_SECONDS)
    return file


def _name_of(file: IO[bytes]) -> str:
    """Return the lock's name: written once, and bound to this very file, so that a copy has another one."""
    file.seek(0)
    name = file.read(64).decode("ascii", "replace").strip()
    if not (name.isalnum() and len(name) == 32):
        file.truncate(0)
        name = uuid.uuid4().hex
        file.write(name.encode())
        file.flush()
    status = os.fstat(file.fileno())
    return f"{name}.{status.st_dev:x}.{status.st_ino:x}"
