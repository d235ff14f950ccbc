from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from boundaries.labels import conversations, records, remarks
from boundaries.tune import FAST, FULL, WAYS, Budget, Found, Tokens, is_shown, write_files

WON = Found(tuned=1.0, base=0.0, difference=1.0, lower=0.9, upper=1.0, count=32, is_proven=True)
SAME = Tokens(taught=[5, 6], written=[5, 6], num_asked=2, ends=[0, 2], ends_taken_away=[0, 2])


@pytest.mark.parametrize("budget", [FAST, FULL])
def test_no_remark_stands_in_two_files_and_labels_are_even(tmp_path: Path, budget: Budget) -> None:
    drawn = remarks(budget.train + budget.test, seed=0)
    splits = {"train": drawn[: budget.train], "test": drawn[budget.train :]}
    assert len({one.text for one in drawn}) == len(drawn)
    assert abs(sum(one.label == "positive" for one in drawn) - len(drawn) / 2) <= 0.5
    for way in WAYS:
        files = write_files(tmp_path, way, splits)
        lines = {split: path.read_text().splitlines() for split, path in files.items()}
        assert {split: len(found) for split, found in lines.items()} == {
            "train": budget.train,
            "test": budget.test,
        }
        assert not set(lines["train"]) & set(lines["test"])


def test_both_sides_of_the_space_are_the_same_text() -> None:
    drawn = remarks(20, seed=1)
    texts = [
        [one["prompt"] + one["completion"] for one in records(drawn, side)] for side in ("prompt", "answer")
    ]
    assert texts[0] == texts[1]
    assert all(one["prompt"].endswith(": ") for one in records(drawn, "prompt"))
    assert all(one["completion"].startswith(" ") for one in records(drawn, "answer"))
    assert json.dumps(next(conversations(drawn))).count(drawn[0].text) == 1


def test_it_is_shown_where_all_won_alike_and_the_tokens_are_the_same() -> None:
    found = dict.fromkeys(WAYS, WON)
    assert is_shown(found, SAME)
    for way in WAYS:
        assert not is_shown({**found, way: replace(WON, is_proven=False)}, SAME)
    assert not is_shown(dict.fromkeys(WAYS, replace(WON, tuned=0.5)), SAME), "labels that are guessed"
    assert not is_shown({**found, "prompt": replace(WON, tuned=0.8)}, SAME)


@pytest.mark.parametrize(
    "changes", [{"written": [5, 7]}, {"num_asked": 3}, {"ends_taken_away": [2]}, {"taught": [5]}], ids=str
)
def test_it_is_not_shown_where_a_token_differs(changes: dict[str, object]) -> None:
    assert not is_shown(dict.fromkeys(WAYS, WON), replace(SAME, **changes))  # type: ignore[arg-type]
