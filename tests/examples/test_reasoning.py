from __future__ import annotations

import json
from pathlib import Path

import yaml
from google.protobuf import json_format
from reasoning import sums
from reasoning.tune import FULL, HERE, write_files

from luthier.grading.checks import grader_violations
from luthier.v1.grader_pb2 import Grader


def test_answers_in_steps_and_at_once_say_the_sum() -> None:
    for terms in sums.draw(200, seed=1):
        assert json.loads(sums.at_once(terms)) == {"sum": sum(terms)}
        found = json.loads(sums.in_steps(terms))
        assert found["sum"] == sum(terms)
        assert len(found["steps"]) == len(terms) - 1
        for step in found["steps"]:
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)


def test_no_sum_stands_in_two_files(tmp_path: Path) -> None:
    files = write_files(tmp_path, FULL)
    questions = [
        json.loads(line)["messages"][1]["content"]
        for path in (*files.answers.values(), *files.questions.values())
        for line in path.read_text().splitlines()
    ]
    assert len(set(questions)) == len(questions)


def test_both_graders_are_valid() -> None:
    for name in ("grader.yaml", "constant.yaml"):
        grader = json_format.ParseDict(yaml.safe_load((HERE / name).read_text()), Grader())
        assert not list(grader_violations(grader, "grader"))
