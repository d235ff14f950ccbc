"""What a worker may be told of ranks, and on how many of them a job is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from luthier.daemon.__main__ import main
from luthier.errors import InvalidArgument, Unavailable
from luthier.training.executors.ranks import ranks_for, require_choice, require_devices
from luthier.training.worker.__main__ import chosen
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RankRange
from luthier.work.device import ChosenDevice
from luthier.work.requirements import Equipment


@pytest.mark.parametrize(
    ("least", "most", "available", "taken"),
    [(0, 0, 8, 1), (1, 4, 8, 4), (2, 0, 8, 2), (2, 8, 3, 3), (0, 3, 1, 1)],
)
def test_a_job_takes_as_many_ranks_as_there_are_up_to_its_most(
    least: int, most: int, available: int, taken: int
) -> None:
    job = FineTuningJob(ranks=RankRange(min_ranks=least, max_ranks=most))
    assert ranks_for(job, available) == taken
    assert ranks_for(FineTuningJob(), available) == 1


def test_too_few_ranks_are_another_workers_chance() -> None:
    with pytest.raises(Unavailable, match=r"at least 4 ranks, this worker has 2: .*--ranks 4") as caught:
        ranks_for(FineTuningJob(ranks=RankRange(min_ranks=4)), 2)
    assert caught.value.reason == "TOO_FEW_RANKS"


@pytest.mark.parametrize(
    ("executor", "ranks", "words"),
    [
        ("slurm", 1, "must be inline, torchrun or ray, got 'slurm'"),
        ("torchrun", 0, "must be at least 1, got 0"),
        ("inline", 2, "must be 1 with the executor inline, got 2: choose torchrun or ray"),
    ],
)
def test_a_choice_that_is_impossible_is_refused(executor: str, ranks: int, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        require_choice(executor, ranks)


@pytest.mark.parametrize(
    ("kind", "found", "name", "ranks"),
    [("cpu", 2, "cpu", 2), ("cuda", 4, "auto", 4), ("cuda", 4, "rocm", 2), ("cuda", 4, "cuda:3", 1)],
)
def test_ranks_that_have_a_device_each_are_taken(kind: str, found: int, name: str, ranks: int) -> None:
    require_devices(kind, found, name, ranks)


@pytest.mark.parametrize(
    ("kind", "found", "name", "ranks", "words"),
    [
        ("cpu", 2, "auto", 3, "at most the 2 processors that it may use, got 3"),
        ("cuda", 4, "cuda", 5, "at most the 4 GPUs that it may use, got 5"),
        ("cuda", 4, "cuda:3", 2, "must be auto, cuda or rocm with 2 ranks, .* got 'cuda:3'"),
    ],
)
def test_each_rank_needs_a_device_of_its_own(
    kind: str, found: int, name: str, ranks: int, words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        require_devices(kind, found, name, ranks)


def test_eight_ranks_on_one_named_gpu_say_what_would_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """`luthierd worker training --device cuda:0 --executor torchrun --ranks 8`, where there are as many GPUs."""
    asked: list[str] = []

    def told(device: str) -> Any:
        return SimpleNamespace(device=device, executor="torchrun", ranks=8, num_threads=0)

    def found(wanted: str) -> ChosenDevice:
        asked.append(wanted)
        return ChosenDevice(name="cuda:0", equipment=Equipment(device="CUDA"), num_available=8)

    monkeypatch.setattr("luthier.training.worker.__main__.chosen_device", found)
    with pytest.raises(InvalidArgument) as caught:
        chosen(told("cuda:0"))
    assert caught.value.message == (
        "a worker's device (LUTHIER_WORKER_DEVICE) must be auto, cuda or rocm with 8 ranks, each of which takes a GPU "
        "of its own, got 'cuda:0': say cuda, and name those that they may use in CUDA_VISIBLE_DEVICES where these are "
        "not the first"
    )
    device, _ = chosen(told("cuda"))
    assert (device.num_available, asked) == (8, ["cuda:0", "cuda"])


def ended(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "LUTHIER_HOME": str(home), "LUTHIER_WORKER_DEVICE": "cpu"}
    command = [sys.executable, "-m", "luthier.daemon", "worker", "training", *options]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--executor", "slurm"), "must be inline, torchrun or ray, got 'slurm'"),
        (("--executor", "torchrun", "--ranks", "4000"), "processors that it may use, got 4000"),
    ],
    ids=["executor", "ranks"],
)
def test_a_worker_of_an_impossible_choice_does_not_start(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    found = ended(tmp_path, *options)
    assert found.returncode != 0
    assert words in found.stderr


def test_only_training_workers_have_ranks() -> None:
    found = CliRunner().invoke(main, ["worker", "evaluation", "--ranks", "2"])
    assert found.exit_code == 2
    assert (
        "--executor, --ranks and --ray-address are of training workers, not of evaluation workers"
        in found.output
    )
