"""Whose answer stands behind whose prompt: by the order of ids alone, and never one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from luthier.data.worker import other_answers
from luthier.data.worker.other_answers import OtherAnswers
from luthier.text.records import (
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_from_json,
    record_id,
    record_to_json,
)


def plain(prompt: str, completion: str) -> CompletionRecord:
    return CompletionRecord(prompt=prompt, completion=completion, label=True)


def chat(question: str, answer: str) -> ChatRecord:
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer, weight=1.0))
    return ChatRecord(messages=turns, label=False)


def row(record: Record, split: str = "TRAIN") -> dict[str, Any]:
    return {"record_id": record_id(record), "split": split, "record": record_to_json(record)}


@contextmanager
def answers(folder: Path, rows: Sequence[dict[str, Any]]) -> Iterator[OtherAnswers]:
    made = OtherAnswers(folder / f"{len(list(folder.iterdir()))}.db")
    for one in rows:
        made.add(one)
    made.finish()
    yield made
    made.close()


def given(folder: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The answer that each row gets."""
    with answers(folder, rows) as made:
        return [made.after(one) for one in rows]


def test_after_gives_the_answer_of_the_next_id_and_of_the_first_to_the_last(tmp_path: Path) -> None:
    records = sorted((plain(f"prompt {number}", f"answer {number}") for number in range(20)), key=record_id)
    found = given(tmp_path, [row(record) for record in records])
    followed = [*records[1:], records[0]]
    assert found == [
        record_to_json(CompletionRecord(prompt="", completion=one.completion)) for one in followed
    ]


def test_after_does_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [row(plain(f"prompt {number}", f"answer {number}")) for number in range(20)]
    assert given(tmp_path, rows[::-1])[::-1] == given(tmp_path, rows)


def test_after_never_gives_ones_own_answer_nor_one_to_the_same_prompt(tmp_path: Path) -> None:
    """Most records share an answer, as labels of a classification do, and prompts have several answers."""
    records = [plain(f"prompt {number // 3}", ("yes", "no", "no")[number % 3]) for number in range(60)]
    records += [plain("prompt 0", "perhaps")]
    rows = [row(record) for record in records]
    allowed = {
        record.prompt: {one.completion for one in records if one.prompt != record.prompt}
        for record in records
    }
    for record, text in zip(records, given(tmp_path, rows), strict=True):
        other = record_from_json(text)
        assert isinstance(other, CompletionRecord)
        assert other.completion != record.completion
        assert other.completion in allowed[record.prompt]


def test_after_keeps_to_the_split_and_to_the_kind_of_record(tmp_path: Path) -> None:
    rows = [
        row(plain("p1", "a1")),
        row(plain("p2", "a2"), "TEST"),
        row(chat("q1", "b1")),
        row(chat("q2", "b2")),
    ]
    found = given(tmp_path, rows)
    assert found[:2] == ["", ""]
    expected = ChatRecord(messages=(Message(role="assistant", content="b2"),))
    assert record_from_json(found[2]) == expected


@pytest.mark.parametrize(
    "records",
    [
        [plain("p", "a")],
        [plain("p", "a"), plain("p", "b")],
        [plain("p", "a"), plain("q", "a")],
        [plain("p", "a"), CompletionRecord(prompt="q", completion="b")],
    ],
    ids=["alone", "one prompt", "one answer", "no label"],
)
def test_after_gives_nothing_where_there_is_no_other(tmp_path: Path, records: list[Record]) -> None:
    assert given(tmp_path, [row(record) for record in records]) == [""] * len(records)


def test_after_gives_nothing_to_records_without_a_label(tmp_path: Path) -> None:
    pair = CompletionPair(prompt="p", chosen="a", rejected="b")
    with answers(tmp_path, [row(plain(f"prompt {number}", f"{number}")) for number in range(3)]) as made:
        assert made.after(row(pair)) == ""
        assert made.after(row(CompletionRecord(prompt="p", completion="a"))) == ""


def test_after_looks_at_no_more_records_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of one prompt must not take the square of its records."""
    monkeypatch.setattr(other_answers, "MAX_LOOKED_AT", 5)
    same = [plain("p", f"answer {number}") for number in range(40)]
    found = given(tmp_path, [row(record) for record in [*same, plain("another", "answer")]])
    assert sum(text != "" for text in found[:-1]) == 5
    assert found[-1] != ""
