"""One record to its rows, or why there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.worker.record_rendering import RecordRenderer, RecordSettings
from luthier.errors import Reason
from luthier.text.findings import FindingKind
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Message,
    Record,
    record_to_json,
)

USER, ASSISTANT = Message(role="user", content="q"), Message(role="assistant", content="a")


def renderer(bundle_folder: Path, **changes: Any) -> RecordRenderer:
    settings: dict[str, Any] = {
        "bundle_folder": str(bundle_folder),
        "chat_template": "",
        "mask_mode": "",
        "max_tokens": 64,
        "length_policy": "DROP",
        "template_date": "2026-11-28",
        "split_turns": False,
        "kind": "SUPERVISED",
    }
    return RecordRenderer(RecordSettings(**{**settings, **changes}))


def single(answer: str, label: bool | None = None) -> ChatRecord:
    return ChatRecord(messages=(USER, Message(role="assistant", content=answer)), label=label)


@pytest.mark.parametrize("split_turns", [False, True])
@pytest.mark.parametrize(
    ("record", "learnt", "found"),
    [
        (
            ChatPair(
                messages=(USER,), chosen=(ASSISTANT,), rejected=(Message(role="assistant", content="b"),)
            ),
            single("a"),
            FindingKind.CHOSEN_SIDE_TAKEN,
        ),
        (
            CompletionPair(prompt="p", chosen="a", rejected="b"),
            CompletionRecord(prompt="p", completion="a"),
            FindingKind.CHOSEN_SIDE_TAKEN,
        ),
        (single("a", label=True), single("a"), FindingKind.DESIRABLE_TAKEN),
        (
            CompletionRecord(prompt="p", completion="a", label=True),
            CompletionRecord(prompt="p", completion="a"),
            FindingKind.DESIRABLE_TAKEN,
        ),
    ],
)
def test_supervised_rows_are_of_the_right_answer_and_that_is_said(
    bundle_folder: Path, record: Record, learnt: Record, found: FindingKind, split_turns: bool
) -> None:
    made = renderer(bundle_folder, split_turns=split_turns)
    rendered = made.render(record_to_json(record))
    assert rendered.rows == made.render(record_to_json(learnt)).rows
    assert rendered.rows
    assert [finding.kind for finding in rendered.findings] == [found]


@pytest.mark.parametrize(
    "record", [single("a", label=False), CompletionRecord(prompt="p", completion="a", label=False)]
)
@pytest.mark.parametrize("split_turns", [False, True])
def test_an_undesirable_answer_is_never_learnt(
    bundle_folder: Path, record: Record, split_turns: bool
) -> None:
    rendered = renderer(bundle_folder, split_turns=split_turns).render(record_to_json(record))
    assert (rendered.rows, rendered.refused) == ((), None)
    assert rendered.no_row == "no row: the answer is labelled undesirable"
    assert [finding.kind for finding in rendered.findings] == [FindingKind.UNDESIRABLE_LEFT_OUT]


@pytest.mark.parametrize("kind", ["PREFERENCE", "UNPAIRED"])
def test_a_record_that_does_not_suit_the_kind_is_refused(bundle_folder: Path, kind: str) -> None:
    refused = renderer(bundle_folder, kind=kind).render(record_to_json(single("a"))).refused
    assert refused is not None
    assert refused.reason == Reason.RENDERING_KIND_MISMATCH
    assert refused.hint.startswith("pass --kind supervised (kind SUPERVISED)")


def test_the_last_answer_of_another_record_stands_behind_the_prompt(bundle_folder: Path) -> None:
    made = renderer(bundle_folder, kind="UNPAIRED")
    rendered = made.render(record_to_json(single("a", label=True)), record_to_json(single("b")))
    assert [row.role for row in rendered.rows] == ["desirable", "mismatched"]
    supervised = renderer(bundle_folder)
    for row, answer in zip(rendered.rows, "ab", strict=True):
        (alone,) = supervised.render(record_to_json(single(answer))).rows
        assert (row.ids, row.mask) == (alone.ids, alone.mask)


def test_prompts_know_how_answers_end_without_seeing_one(bundle_folder: Path) -> None:
    prompts, answers = renderer(bundle_folder, kind="PROMPT"), renderer(bundle_folder)
    record = record_to_json(single("a"))
    assert prompts.teaching() == answers.teaching()
    assert prompts.render(record).ending_ids == answers.render(record).ending_ids
