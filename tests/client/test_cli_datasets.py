"""How dataset versions and their records look on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

from luthier.v1.chat_pb2 import (
    LABEL_DESIRABLE,
    LABEL_UNDESIRABLE,
    ChatMessage,
    CompletionPair,
    Conversation,
    ConversationPair,
    PromptCompletion,
)
from luthier.v1.data_service_pb2 import ListRecordsResponse
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_OPENAI_CHAT,
    DATASET_FORMAT_SHAREGPT_UNPAIRED,
    SPLIT_TRAIN,
    DatasetSource,
    DatasetVersion,
    Record,
)

Run = Callable[..., Result]
VERSION = "projects/default/datasets/mine/versions/v1"


def said(role: str, content: str) -> ChatMessage:
    return ChatMessage(role=role, content=content)


CALLS = '[{"function": {"name": "f"}}]'
CALLING = ChatMessage(role="assistant", tool_calls_json=CALLS)
RECORDS = [
    (
        Record(conversation=Conversation(messages=[said("user", "q"), CALLING])),
        ["user: q", f"assistant: {CALLS}"],
    ),
    (
        Record(prompt_completion=PromptCompletion(prompt="p", completion="c"), label=LABEL_UNDESIRABLE),
        ["prompt: p", "completion: c", "label: undesirable"],
    ),
    (
        Record(
            conversation=Conversation(messages=[said("user", "q"), said("assistant", "a")]),
            label=LABEL_DESIRABLE,
        ),
        ["user: q", "assistant: a", "label: desirable"],
    ),
    (
        Record(completion_pair=CompletionPair(prompt="p", chosen="c", rejected="r")),
        ["prompt: p", "chosen: c", "rejected: r"],
    ),
    (
        Record(
            conversation_pair=ConversationPair(
                messages=[said("system", "s"), said("user", "q")],
                chosen=[CALLING, said("tool", "42"), said("assistant", "yes")],
                rejected=[said("assistant", "no")],
            )
        ),
        [
            "system: s",
            "user: q",
            f"chosen, assistant: {CALLS}",
            "chosen, tool: 42",
            "chosen, assistant: yes",
            "rejected: no",
        ],
    ),
]


@pytest.mark.parametrize(("record", "shown"), RECORDS, ids=range(len(RECORDS)))
def test_datasets_records_shows_every_part_of_an_example_once(
    services: Any, run: Run, record: Record, shown: list[str]
) -> None:
    record.filename, record.line, record.split = "a.jsonl", 7, SPLIT_TRAIN
    services.answers["ListRecords"] = lambda request, context: ListRecordsResponse(records=[record])
    result = run("datasets", "records", "mine/v1")
    assert result.exit_code == 0, result.stderr
    _, first, *rest = (line.rstrip() for line in result.stdout.splitlines())
    place = re.match(r" *0 +train +a\.jsonl:7 +", first)
    assert place is not None
    assert [first[place.end() :], *(line.lstrip() for line in rest)] == shown


def test_datasets_show_names_the_format_of_each_source(services: Any, run: Run) -> None:
    version = DatasetVersion(
        name=VERSION,
        state=DatasetVersion.STATE_READY,
        sources=[
            DatasetSource(filename="a.json", detected_format=DATASET_FORMAT_SHAREGPT_UNPAIRED),
            DatasetSource(filename="b.jsonl", detected_format=DATASET_FORMAT_OPENAI_CHAT),
            DatasetSource(filename="c.jsonl", detected_format=4711),  # type: ignore[arg-type]
            DatasetSource(filename="d.jsonl"),
        ],
    )
    services.answers["GetDatasetVersion"] = lambda request, context: version
    result = run("datasets", "show", "mine/v1")
    assert result.exit_code == 0, result.stderr
    listed = "a.json (sharegpt-unpaired), b.jsonl (openai-chat), c.jsonl (4711), d.jsonl"
    assert listed in re.sub(r"\s+", " ", result.stdout)
