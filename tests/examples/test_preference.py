from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from preference import orders
from preference.tune import FAST, FULL, Budget, write_files


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("budget", [FAST, FULL])
def test_no_question_stands_in_two_files(tmp_path: Path, budget: Budget) -> None:
    files = write_files(tmp_path, budget, is_control=False)
    paths = [*files.answers.values(), *files.pairs.values()]
    questions = [
        re.findall(r'"role": "user", "content": "([^"]+)"', line)[0]
        for path in paths
        for line in path.read_text().splitlines()
    ]
    sizes = (budget.taught, budget.validation, budget.test, budget.pairs, budget.validation)
    assert len(questions) == sum(sizes)
    assert len(set(questions)) == len(questions)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_files(tmp_path / name, FAST, is_control=False) for name in "ab")
    for one, other in zip(first.pairs.values(), second.pairs.values(), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_both_answers_are_right_and_the_short_one_is_within_the_question() -> None:
    for one in orders.examples(200, seed=3):
        assert re.search(rf"\b{one.short}\b", one.question)
        assert re.search(rf"\b{one.short}\b", one.long)
        assert len(one.long) > 3 * len(one.short)


def test_a_control_prefers_each_kind_of_answer_as_often(tmp_path: Path) -> None:
    for is_control, share in ((False, 1.0), (True, 0.5)):
        files = write_files(tmp_path, FULL, is_control=is_control)
        pairs = read(files.pairs["train"])
        shorter = [len(str(pair["chosen"])) < len(str(pair["rejected"])) for pair in pairs]
        assert sum(shorter) == share * len(pairs)
        held = read(files.pairs["validation"])
        assert all(len(str(pair["chosen"])) < len(str(pair["rejected"])) for pair in held)
