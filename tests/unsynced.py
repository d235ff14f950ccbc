"""What a test writes in its own process does not wait for the disk: a power cut is what nobody can test here.

A killed process loses nothing by it: what it has written is the kernel's. Tests about stores and full disks wait all
the same, and so do the processes that tests start.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

import pytest
from sqlalchemy.engine import Engine

from luthier.storage import dialect

REAL = ("tests/storage/*.py", "test_cache.py", "test_*disk_full.py", "test_*kill*.py")


@contextmanager
def unsynced() -> Iterator[None]:
    """Have it so for the length of a block."""
    sync, configure = os.fsync, dialect._configure

    def sync_where_real(descriptor: int) -> None:
        if is_about_disks():
            sync(descriptor)
        else:
            os.fstat(descriptor)  # as an error of a closed file must be seen

    def configure_where_real(engine: Engine, pragmas: Sequence[str]) -> None:
        chosen = [one if is_about_disks() else one.replace("=FULL", "=OFF") for one in pragmas]
        configure(engine, chosen)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", sync_where_real)
        patched.setattr(dialect, "_configure", configure_where_real)
        yield


def is_about_disks() -> bool:
    """Tell whether the test that runs wants the real thing."""
    module = PurePath(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0])
    return any(module.match(pattern) for pattern in REAL)
