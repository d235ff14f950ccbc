"""`luthierd` on a disk that others have filled: it starts again, whoever waits for room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.small_disk import fill, fill_again, mounted

from luthier.daemon.__main__ import _only_one
from luthier.daemon.config import Config


def test_the_lock_of_a_home_is_taken_again_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "small", 1) as home:
        config = Config(home=home, data_address="", training_address="", evaluation_address="")
        with _only_one(config):
            fill(home)
        pid = os.getpid()

        def too_late() -> int:
            fill_again(home)
            return pid

        monkeypatch.setattr(os, "getpid", too_late)
        with _only_one(config):
            assert (home / "luthierd.lock").read_text().strip() == str(pid)
