"""A worker whose device is not there does not start, and says what is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from luthier.daemon.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_worker_without_its_device_does_not_start(tmp_path: Path, kind: str) -> None:
    environ = {**os.environ, "LUTHIER_HOME": str(tmp_path), "LUTHIER_WORKER_DEVICE": "cuda:1"}
    command = [sys.executable, "-m", f"luthier.{kind}.worker"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert "LUTHIER_WORKER_DEVICE" in ended.stderr
    assert "got 'cuda:1'; there is cpu" in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_flag_wins_over_the_setting(tmp_path: Path) -> None:
    environ = {**os.environ, "LUTHIER_HOME": str(tmp_path), "LUTHIER_WORKER_DEVICE": "cpu"}
    command = [sys.executable, "-m", "luthier.daemon", "worker", "training", "--device", "cuda:1"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "(--device, LUTHIER_WORKER_DEVICE) must be auto, cpu" in ended.stderr
    assert "got 'cuda:1'; there is cpu" in ended.stderr
    assert not (tmp_path / "work").exists(), "it took no place and did not register"


def test_a_data_worker_takes_no_device() -> None:
    refused = CliRunner().invoke(main, ["worker", "data", "--device", "cpu"])
    assert refused.exit_code == 2
    assert "--device is for training and evaluation workers: a data worker has no model" in refused.output
