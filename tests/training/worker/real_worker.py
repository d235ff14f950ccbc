"""A real training worker, as `luthierd worker training` starts it, for a site of these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.memory_group import MemoryGroup
from tests.training.worker.conftest import Site


@contextmanager
def real_worker(
    site: Site, name: str, *options: str, group: MemoryGroup | None = None, **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one for the length of a block, in a control group if one is given; `settings` are of its environment."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LUTHIER_")}
    environ = clean | {
        "LUTHIER_HOME": str(site.home),
        "LUTHIER_DATA_ADDRESS": site.data_address,
        "LUTHIER_TRAINING_ADDRESS": site.address,
        "LUTHIER_WORKER_NAME": name,
        "LUTHIER_WORKER_NUM_THREADS": "1",
        **settings,
    }
    command = [sys.executable, "-m", "luthier.daemon", "worker", "training", "--device", "cpu", *options]
    with (site.home / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(
            group.command(*command) if group else command, env=environ, stdout=log, stderr=log
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(30)
        finally:
            running.kill()
            running.wait()
