"""What several modules run programs by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.daemon.copies import Copies, copies


@pytest.fixture(scope="session")
def programs() -> Iterator[Copies]:
    """Programs that end by themselves; modules that use them are named in TOGETHER in tests/conftest.py."""
    with copies() as made:
        yield made
