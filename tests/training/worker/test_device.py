"""A worker whose device is not there does not start, and says what is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_worker_without_its_device_does_not_start(tmp_path: Path, kind: str) -> None:
    environ = {**os.environ, "LUTHIER_HOME": str(tmp_path), "LUTHIER_WORKER_DEVICE": "cuda:1"}
    command = [sys.executable, "-m", f"luthier.{kind}.worker"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert "LUTHIER_WORKER_DEVICE" in ended.stderr
    assert "got 'cuda:1'; there is cpu" in ended.stderr
