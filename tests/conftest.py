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

# More processes than there are cores run the tests: threads that wait for one another must not spin meanwhile, and a
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


# Modules that share what takes long to start, by its name: all of their tests run in one process, in this order and
# before the others.
TOGETHER = {
    "tests/e2e/test_kill.py": "cluster",
    "tests/e2e/test_mixed.py": "cluster",
    "tests/e2e/test_preference.py": "cluster",
    "tests/e2e/test_soak.py": "cluster",
    "tests/e2e/test_reinforcement.py": "cluster",
    "tests/e2e/test_bad_input.py": "cluster",
    "tests/e2e/test_files.py": "cluster",
    "tests/e2e/test_no_worker.py": "cluster",
    "tests/e2e/test_own_file.py": "cluster",
    "tests/e2e/test_generation.py": "cluster",
    "tests/e2e/test_typescript.py": "cluster",
    "tests/e2e/test_main_path.py": "cluster",
    "tests/e2e/test_taught.py": "cluster",
    "tests/e2e/test_take_away.py": "cluster",
    "tests/e2e/test_weights.py": "cluster",
    "tests/e2e/test_learning_curve.py": "cluster",
    "tests/e2e/test_judges.py": "cluster",
    "tests/golden/test_deletion.py": "deletion",
    "tests/golden/test_forgetting.py": "forgetting",
    "tests/golden/test_homes.py": "homes",
    "tests/daemon/test_up.py": "up",
    "tests/daemon/test_luthierd.py": "luthierd",
    "tests/daemon/test_fsck.py": "programs",
    "tests/daemon/test_grant_key.py": "programs",
    "tests/daemon/test_webhook_secret.py": "programs",
    "tests/daemon/test_start_failures.py": "programs",
    "tests/evaluation/worker/test_drift.py": "drift",
    "tests/evaluation/worker/test_asking.py": "asking",
    "tests/evaluation/worker/test_in_child.py": "engines",
    "tests/training/worker/test_in_child.py": "children",
    "tests/training/executors/test_torchrun.py": "ranks",
    "tests/training/executors/test_sharding.py": "sharding",
    "tests/training/executors/ray/test_two_nodes.py": "nodes",
    "tests/training/worker/test_pausing.py": "pausing",
    "tests/client/test_report_in_a_browser.py": "browser",
}
MANY_MODULES = 100
# What is together within a process is told and counted together: two thirds of what that costs for tests that take
# milliseconds. Where single tests take seconds, each goes to whoever is free.
SINGLY = (
    "tests/benchmarks/",
    "tests/evaluation/worker/",
    "tests/golden/",
    "tests/kernels/",
    "tests/training/worker/",
)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives tests to the first process that is free: those of TOGETHER, and a function's with all its parameters.

    In place of marks and `--dist loadgroup`, which xdist 3.8 ignores with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        alone = nodeid if module.startswith(SINGLY) else nodeid.partition("[")[0]
        return TOGETHER.get(module, alone)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """Forget what is done, which xdist would look through again whenever a test ends."""
        super().mark_test_complete(node, item_index, duration)
        scope = self._split_scope(self.registered_collections[node][item_index])
        if all(self.assigned_work[node][scope].values()):
            del self.assigned_work[node][scope]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Have `-n auto` start one process more than there are cores: often one waits for a service or a worker."""
    is_said = "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ
    return None if is_said else len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """Distribute the tests so whatever `--dist` says, in the order in which they were collected."""
    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--isa`, for the kernels' tests, and where all others have their stores."""
    parser.addoption(
        "--isa", action="append", help="only this instruction set (may be repeated; default: all)"
    )
    for what in ("database", "blobs"):
        parser.addoption(
            f"--{what}-url",
            default="",
            help=f"template of the URL of each {what.removesuffix('s')} store, see tests/stores.py (default: files)",
        )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the stores."""
    urls = [config.getoption(f"--{what}-url") for what in ("database", "blobs")]
    if not any(urls):
        return
    from tests import stores

    from luthier.errors import InvalidArgument

    try:
        stores.use(*urls)
    except InvalidArgument as error:
        raise pytest.UsageError(error.message) from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes long first: else the last of it runs while the other processes have nothing left to do."""
    order = {module: place for place, module in enumerate(TOGETHER)}
    others = len(order) + 1

    def place(item: pytest.Item) -> int:
        is_long = item.get_closest_marker("long") is not None
        return order.get(item.nodeid.partition("::")[0], others - is_long)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Take what the imports made out of what is searched for garbage: each search took 0.3 s of it."""
    gc.freeze()
    gc.enable()
    Searched.num_modules = len(sys.modules)


class Searched:
    """How many modules there were when what they made was last taken out of the search for garbage."""

    num_modules = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Do so again when a test has imported many: the tests after it search it each time, some of them often."""
    if len(sys.modules) - Searched.num_modules >= MANY_MODULES:
        gc.collect()
        gc.freeze()
        Searched.num_modules = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _migrated_once() -> Iterator[None]:
    """Have each set of branches migrate an empty database once; tests that are about that do it again and again."""
    if "luthier.storage.migrations" not in sys.modules:
        yield
        return
    from tests.migrated import creating_once, migrating_once

    with migrating_once(), creating_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> Iterator[None]:
    """Have databases share what SQLAlchemy makes of statements."""
    if "luthier.storage.dialect" not in sys.modules:
        yield
        return
    from tests.compiled_once import compiling_once

    with compiling_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def _unsynced() -> Iterator[None]:
    """Have what tests write not wait for the disk."""
    if "luthier.storage.dialect" not in sys.modules:
        yield
        return
    from tests.unsynced import unsynced

    with unsynced():
        yield


@pytest.fixture(scope="session", autouse=True)
def _hosted_quickly() -> Iterator[None]:
    """Have services that tests host do without what no test of them is about."""
    if "luthier.work.host" not in sys.modules:
        yield
        return
    from tests.quick_hosting import hosting_quickly

    with hosting_quickly():
        yield


@pytest.fixture(scope="session", autouse=True)
def _processes_kept() -> Iterator[None]:
    """Have what runs templates and tokenizers stay for the next test."""
    if "luthier.work.text_pool" not in sys.modules:
        yield
        return
    from tests.kept_processes import keeping_processes

    with keeping_processes():
        yield


@pytest.fixture(scope="session", autouse=True)
def _scanned_once_a_launch() -> Iterator[None]:
    """Have Triton's interpreter do less beside what it computes."""
    if "triton.runtime.interpreter" not in sys.modules:
        yield
        return
    from tests.interpreted import scanned_once_a_launch

    with scanned_once_a_launch():
        yield


@pytest.fixture(autouse=True)
def _default_type_kept() -> Iterator[None]:
    """No test leaves torch computing in another type: the tests after it would fail, and not this one."""
    yield
    if torch := sys.modules.get("torch"):
        found = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        assert found == torch.float32, f"torch's default type must still be float32, got {found}"
