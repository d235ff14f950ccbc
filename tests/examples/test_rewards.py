"""The example reward service in a process of its own, called as Luthier calls it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.client.message_files import read_message
from luthier.errors import Reason
from luthier.grading.checks import grader_violations
from luthier.grading.graders import ReadGrader
from luthier.grading.outcomes import GradingError
from luthier.grading.outcomes import Sample as Answer
from luthier.v1.grader_pb2 import Grader, RemoteGrader, Sample
from luthier.work.rewards import RewardAddresses, RewardError, scored

FOLDER = Path(__file__).parents[2] / "examples" / "rewards"
SAMPLES = [json.loads(line) for line in (FOLDER / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, str(FOLDER / "server.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def rewards(address: str, samples: list[Sample]) -> list[float | RewardError]:
    return scored(RemoteGrader(address=address), samples, RewardAddresses(["127.0.0.1"]))


def test_the_example_scores_in_its_own_process(address: str) -> None:
    samples = [Sample(item_json=json.dumps(one["item"]), output_text=one["output_text"]) for one in SAMPLES]
    right, wrong, unknown = rewards(address, samples)
    assert (right, wrong) == (1.0, 0.0)
    assert isinstance(unknown, RewardError)
    assert unknown.reason == Reason.REWARD_FAILED
    assert "the record must have a whole number `sum`, it has question" in unknown.message
    (long,) = rewards(address, [Sample(item_json='{"sum": 4}', output_text="so " * 39 + "4")])
    assert long == 0.5


def test_the_graders_file_of_the_example_is_one(address: str) -> None:
    file = FOLDER / "grader.yaml"
    grader = read_message(file.read_bytes(), Grader, source="grader.yaml").message
    assert list(grader_violations(grader, "grader")) == []
    (found,) = rewards(address, [Sample(item_json='{"sum": 42}', output_text="17 + 25 = 42")])
    assert isinstance(found, float)
    read = ReadGrader(grader)
    assert read.grade(Answer(item_json="", output_text="= 42", remote={"right": found})).score == 1.0
    error = GradingError(Reason.REWARD_FAILED, "no")
    assert read.grade(Answer(item_json="", output_text="= 42", remote={"right": error})).score is None
