"""The migrations make the tables that the code declares."""

from __future__ import annotations

from pathlib import Path

from luthier.storage.migrations import differences, upgrade
from luthier.work.schema import MIGRATIONS, metadata


def test_the_migrated_schema_is_the_declared_one(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'work.db'}"
    upgrade(url, (MIGRATIONS,))
    assert differences(url, metadata) == []
