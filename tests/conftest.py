"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    # Without a GPU Triton's kernels are interpreted, on tensors in main memory. It settles that when it is imported,
    # which torch and transformers do wherever they like: so here, before anything else.
    os.environ["TRITON_INTERPRET"] = "1"

# Machines that run the tests are shared: a slow example is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--isa`: the kernels' tests run with these instruction sets alone."""
    parser.addoption(
        "--isa", action="append", help="only this instruction set (may be repeated; default: all)"
    )
