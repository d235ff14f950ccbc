"""What processes import: a driver no torch, and one that computes nothing by which it could speak to others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

MODULE = "luthier.training.worker.child"
DRIVER = "import sys; import luthier.training.worker.__main__; print('torch' in sys.modules)"
CONNECTS = ("luthier.work.peers", "luthier.work.link", "luthier.work.retry", "luthier.work.rewards")
RANK_OF_RAY = "import luthier.training.executors.ray.rank" if importlib.util.find_spec("ray") else ""
CHILD = f"""
import sys
import {MODULE}
import luthier.training.worker.computing
import luthier.training.executors.joining
{RANK_OF_RAY}
print([name for name in {CONNECTS} if name in sys.modules])
"""


@pytest.mark.parametrize(("code", "said"), [(DRIVER, "False"), (CHILD, "[]")], ids=["driver", "child"])
def test_a_driver_has_no_torch_and_a_child_nothing_that_connects(code: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
