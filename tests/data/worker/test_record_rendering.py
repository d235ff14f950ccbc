"""One record to its rows, or why there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.worker.record_rendering import RecordRenderer, RecordSettings, Refused
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
PAIR = "must have one answer, got a pair of a chosen and a rejected one"
LABEL = "must have an answer without a label, got {}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ChatPair(messages=(USER,), chosen=(ASSISTANT,), rejected=(ASSISTANT,)), PAIR),
        (CompletionPair(prompt="p", chosen="a", rejected="b"), PAIR),
        (ChatRecord(messages=(USER, ASSISTANT), label=False), LABEL.format("false")),
        (CompletionRecord(prompt="p", completion="a", label=True), LABEL.format("true")),
    ],
)
@pytest.mark.parametrize("split_turns", [False, True])
def test_what_has_no_single_right_answer_is_never_learnt_as_one(
    bundle_folder: Path, record: Record, message: str, split_turns: bool
) -> None:
    renderer = RecordRenderer(
        RecordSettings(
            bundle_folder=str(bundle_folder),
            chat_template="",
            mask_mode="",
            max_tokens=64,
            length_policy="DROP",
            template_date="2026-11-28",
            split_turns=split_turns,
        )
    )
    rendered = renderer.render(record_to_json(record))
    assert rendered.refused == Refused(reason="INVALID_FIELD", message=message)
    assert rendered.rows == ()
