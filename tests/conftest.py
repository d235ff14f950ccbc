"""What holds for every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# Machines that run the tests are shared: a slow example is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--isa`: the kernels' tests run with these instruction sets alone."""
    parser.addoption(
        "--isa", action="append", help="only this instruction set (may be repeated; default: all)"
    )
