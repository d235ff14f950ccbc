"""What holds for every test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    # Without a GPU Triton's kernels are interpreted, on tensors in main memory. It settles that when it is imported,
    # which torch and transformers do wherever they like: so here, before anything else.
    os.environ["TRITON_INTERPRET"] = "1"

# As many processes as there are cores run the tests: threads that wait for one another must not spin meanwhile, and a
# test that is not about threads is quickest with one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hundreds of interpreters start in a run: each would compile all of our modules anew where no bytecode is kept.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What is imported while tests are collected is no garbage: no search for it until all is there.
gc.disable()

# Machines that run the tests are shared: a slow example is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


# Modules that share what takes long to start, by its name: all of their tests run in one process, before the others.
TOGETHER = {
    "tests/daemon/test_luthierd.py": "luthierd",
    "tests/e2e/test_bad_input.py": "tuning",
    "tests/e2e/test_files.py": "tuning",
    "tests/e2e/test_kill.py": "tuning",
    "tests/e2e/test_no_worker.py": "tuning",
    "tests/e2e/test_own_file.py": "tuning",
    "tests/e2e/test_generation.py": "whole",
    "tests/e2e/test_main_path.py": "whole",
    "tests/e2e/test_taught.py": "whole",
}


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives each test to the first process that is free, and those of TOGETHER to one.

    In place of marks and `--dist loadgroup`, which xdist 3.8 ignores with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER.get(nodeid.partition("::")[0], nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Distribute the tests so whatever `--dist` says."""
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--isa`: the kernels' tests run with these instruction sets alone."""
    parser.addoption(
        "--isa", action="append", help="only this instruction set (may be repeated; default: all)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first: else the last of it runs while the other processes have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Take what the imports made out of what is searched for garbage: each search took 0.3 s of it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _migrated_once() -> Iterator[None]:
    """Have each set of branches migrate an empty database once; tests that are about that do it again and again."""
    if "luthier.storage.migrations" not in sys.modules:
        yield
        return
    from tests.migrated import migrating_once

    with migrating_once():
        yield
