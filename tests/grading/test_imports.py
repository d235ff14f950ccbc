"""Grading stays light: the services that use it have no torch, and no wire of their own is in it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import luthier.grading

HEAVY = {"torch", "transformers", "peft", "grpc", "sqlalchemy"}


def test_no_module_of_grading_imports_torch_or_a_wire() -> None:
    names = [one.name for one in pkgutil.walk_packages(luthier.grading.__path__, "luthier.grading.")]
    assert "luthier.grading.metrics.intervals" in names
    code = f"import sys, {', '.join(names)}\nprint(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
