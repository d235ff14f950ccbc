"""What a process imports at its start is not searched for garbage."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process of its own, and a stack of generations that is nobody else's.
PROGRAM = """
import gc
from luthier.lm.importing import uncollected

searches = []
gc.callbacks.append(lambda phase, info: searches.append(info["generation"]) if phase == "start" else None)
with uncollected():
    made = [[number] for number in range(200_000)]
    {inside}
assert gc.isenabled()
assert gc.get_freeze_count() >= 200_000
assert searches == [], searches
gc.collect()
assert searches == [2]
assert len(gc.get_objects()) < 200_000, "what was made is searched no more"
"""


def test_what_is_imported_is_never_searched() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM.format(inside="pass")], check=True)


def test_a_failed_import_leaves_the_search_as_it_was() -> None:
    failing = PROGRAM.format(inside="raise ImportError('no torch')")
    done = subprocess.run([sys.executable, "-c", failing], capture_output=True, text=True, check=False)
    assert "no torch" in done.stderr


@pytest.mark.parametrize("worker", ["training", "evaluation"])
def test_torch_is_imported_so_by_workers(worker: str) -> None:
    """A worker's module itself imports no torch: its `main` does, where nothing is searched."""
    program = f"import sys, luthier.{worker}.worker.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_said_of_libraries_that_quantising_has_in_vain() -> None:
    program = "import luthier.lm.load, torchao, torchao.optim, torchao.quantization"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
