"""Splits of a version: no prompt is in two of them, and what is not as it was asked for is said."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.made_records import lines
from tests.data.worker.test_building import build, pair, rows

from luthier.data.splits import assign_split
from luthier.data.worker.building import Built
from luthier.data.worker.splitting import Place, Splitter
from luthier.text.records import CompletionRecord, prompt_id
from luthier.v1.dataset_pb2 import (
    SPLIT_TEST,
    SPLIT_TRAIN,
    SPLIT_UNSPECIFIED,
    SPLIT_VALIDATION,
    SplitSettings,
)

HALVES = SplitSettings(validation_fraction=0.3, test_fraction=0.3, seed=2)
USER = {"role": "user", "content": "q"}


def turns(question: str, *others: str) -> list[dict[str, str]]:
    """A question, and then answers and further questions by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate((question, *others))]


def records_of(question: str) -> dict[str, list[dict[str, Any]]]:
    """By format: records that begin by asking a question as a conversation."""
    by_from = [{"from": "human", "value": question}]
    answers = [[{"role": "assistant", "content": text}] for text in "ab"]
    return {
        "openai": [{"messages": turns(question, "a")}, {"messages": turns(question, "b", "more?", "c")}],
        "alpaca": [{"instruction": question, "output": text} for text in "ab"],
        "question": [{"question": question, "answer": text} for text in "cd"],
        "sharegpt": [{"conversations": [*by_from, {"from": "gpt", "value": text}]} for text in "ef"],
        "pairs": [
            {"prompt": turns(question), "chosen": answers[0], "rejected": answers[1]},
            {"prompt": turns(question, "b", "more?"), "chosen": answers[1], "rejected": answers[0]},
        ],
        "labels": [
            {"messages": turns(question, text), "label": label} for text, label in (("a", True), ("b", False))
        ],
    }


def splits_by_question(built: Built) -> dict[str, set[str]]:
    found = defaultdict(set)
    for row in rows(built):
        question = next(word for word in row["record"].split('"') if word.startswith("question"))
        found[question].add(row["split"])
    return found


def test_records_that_ask_the_same_are_in_one_split_whatever_their_format(tmp_path: Path) -> None:
    questions = [f"question {number}" for number in range(40)]
    kinds = list(records_of(""))
    sources = [
        lines(*(record for question in questions for record in records_of(question)[kind])) for kind in kinds
    ]
    built = build(tmp_path, *sources, splitting=HALVES)
    assert built.errors == ()
    # Alpaca's and OpenAI's first records are equal.
    assert built.statistics.num_records == 40 * 2 * len(kinds) - 40
    found = splits_by_question(built)
    assert sorted(found) == sorted(questions)
    assert {len(splits) for splits in found.values()} == {1}
    assert {split for splits in found.values() for split in splits} == {"TRAIN", "VALIDATION", "TEST"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abc")), unique=True, min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcdef")), unique=True, max_size=20),
    st.integers(0, 3),
)
def test_more_answers_to_a_question_go_where_its_answers_are(
    tmp_path: Path, old: list[tuple[int, str]], added: list[tuple[int, str]], seed: int
) -> None:
    def built(answers: list[tuple[int, str]], name: str) -> list[dict[str, Any]]:
        values = [{"prompt": f"question {number}", "completion": text} for number, text in answers]
        chosen = SplitSettings(validation_fraction=0.3, test_fraction=0.3, seed=seed)
        return rows(build(tmp_path / name, lines(*values), splitting=chosen))

    folder = str(len(list(tmp_path.iterdir())))
    before = {row["record_id"]: row["split"] for row in built(old, f"{folder}-old")}
    after = built([*added, *old], f"{folder}-new")
    assert before.items() <= {row["record_id"]: row["split"] for row in after}.items()
    prompts = {(row["record"].partition('"prompt":')[2], row["split"]) for row in after}
    assert len(prompts) == len({prompt for prompt, _ in prompts})


def test_records_that_ask_nothing_are_divided_one_by_one(tmp_path: Path) -> None:
    texts = [{"prompt": "", "completion": f"text {number}"} for number in range(60)]
    greetings = [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": f"hello {number}"},
            ]
        }
        for number in range(60)
    ]
    for name, values in (("plain", texts), ("chat", greetings)):
        built = build(tmp_path / name, lines(*values), splitting=HALVES)
        assert len({row["split"] for row in rows(built)}) == 3
        assert built.warnings == ()


def asking(*numbers: int, answer: str) -> bytes:
    return lines(*({"prompt": f"question {number}", "completion": answer} for number in numbers))


def test_a_prompt_in_two_fixed_splits_is_warned_of_with_its_first_places(tmp_path: Path) -> None:
    built = build(
        tmp_path,
        (asking(1, 2, 3, answer="a"), SPLIT_TRAIN),
        (asking(4, 3, 2, 3, answer="b"), SPLIT_TEST),
        (asking(3, 5, answer="c"), SPLIT_VALIDATION),
    )
    assert built.warnings == (
        "2 prompts stand in more than one split, as sources have splits of their own: what one split teaches another "
        "asks; the first is 1.jsonl:2 (test), which asks what 0.jsonl:3 (train) asks",
    )


def test_a_prompt_that_the_hash_parts_from_a_fixed_one_is_warned_of(tmp_path: Path) -> None:
    built = build(tmp_path, asking(1, answer="a"), (asking(2, 1, answer="b"), SPLIT_TEST))
    assert built.warnings == (
        "1 prompt stands in more than one split, as sources have splits of their own: what one split teaches another "
        "asks; the first is 1.jsonl:2 (test), which asks what 0.jsonl:1 (train) asks",
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [(SPLIT_TRAIN, SPLIT_TRAIN), (SPLIT_UNSPECIFIED, SPLIT_UNSPECIFIED), (SPLIT_TRAIN, SPLIT_TEST)],
)
def test_splits_that_share_no_prompt_are_not_warned_of(tmp_path: Path, first: Any, second: Any) -> None:
    """Equal records are one, and are in the first one's split."""
    other = 1 if first == second else 2
    built = build(
        tmp_path,
        (asking(1, answer="a"), first),
        (asking(1, answer="a") + asking(other, answer="b"), second),
        splitting=SplitSettings(seed=1),
    )
    assert (built.warnings, built.statistics.num_duplicates) == ((), 1)


def test_a_split_far_from_its_share_is_warned_of(tmp_path: Path) -> None:
    prompt = prompt_id(CompletionRecord(prompt="one question", completion="a"))
    assert prompt is not None
    tested = [
        assign_split(prompt, SplitSettings(test_fraction=0.1, seed=seed)) == SPLIT_TEST for seed in range(50)
    ]
    values = [{"prompt": "one question", "completion": str(number)} for number in range(200)]
    for is_tested, found in (
        (False, "0 of the 200 records that the hash divides (0.0%)"),
        (True, "200 of the 200 "),
    ):
        splitting = SplitSettings(test_fraction=0.1, seed=tested.index(is_tested))
        (warning,) = build(tmp_path / str(is_tested), lines(*values), splitting=splitting).warnings
        assert warning.startswith(found)
        assert warning.endswith(
            "are in the test split, where test_fraction asks for 10.0%: records that begin by asking the same stay "
            "together"
        )
        others = [*values[:10], *map(pair, range(2000))]
        assert build(tmp_path / f"{is_tested}-few", lines(*others), splitting=splitting).warnings == ()


@given(st.integers(1, 3000), st.floats(0.01, 0.5), st.integers(0, 5))
def test_records_that_ask_different_things_are_never_said_to_stay_together(
    count: int, share: float, seed: int
) -> None:
    splitter = Splitter(SplitSettings(test_fraction=share, seed=seed), None)
    for number in range(count):
        record = CompletionRecord(prompt=str(number), completion="a")
        splitter.split_of(record, str(number), Place(filename="a", split=SPLIT_UNSPECIFIED), number)
    assert all(warning.endswith("they are few") for warning in splitter.warnings())


def test_a_share_that_no_record_falls_into_is_warned_of(tmp_path: Path) -> None:
    built = build(tmp_path, lines(pair(1)), splitting=SplitSettings(validation_fraction=0.01))
    assert built.warnings == (
        "0 of the 1 records that the hash divides (0.0%) are in the validation split, where validation_fraction asks "
        "for 1.0%: they are few",
    )
    fixed = build(tmp_path / "fixed", (lines(pair(1)), SPLIT_TRAIN), splitting=HALVES)
    assert fixed.warnings == ()
