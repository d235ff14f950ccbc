"""Real files of other projects, as they are: they lie beside some checkouts and are no part of this one."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tests.data.worker.test_building import rows
from tests.data.worker.test_version_rendering import learnt, render
from tests.data.worker.test_version_rendering import rows as rendered_rows

from luthier.data.worker.building import Built, VersionBuilder
from luthier.data.worker.record_rendering import RecordSettings
from luthier.data.worker.splitting import Place
from luthier.data.worker.version_rendering import RenderOrder
from luthier.text.records import ChatPair, ChatRecord, record_from_json
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_ALPACA,
    DATASET_FORMAT_QUESTION_ANSWER,
    DATASET_FORMAT_SHAREGPT,
    DATASET_FORMAT_SHAREGPT_PREFERENCE,
    DATASET_FORMAT_SHAREGPT_UNPAIRED,
    DATASET_FORMAT_UNSPECIFIED,
    SPLIT_UNSPECIFIED,
    DatasetFormat,
    SplitSettings,
)
from luthier.v1.rendering_pb2 import TemplateErrorPolicy
from luthier.worker.v1.task_pb2 import RenderSpec

TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows tools and their calls, which the template of the tests' model does not."""
FOLDER = Path(__file__).parents[4] / "shared" / "data"
FILES = {
    "alpaca_en_demo.json": (DATASET_FORMAT_ALPACA, 999),
    "dpo_en_demo.json": (DATASET_FORMAT_SHAREGPT_PREFERENCE, 300),
    "kto_en_demo.json": (DATASET_FORMAT_SHAREGPT_UNPAIRED, 300),
    "glaive_toolcall_en_demo.json": (DATASET_FORMAT_SHAREGPT, 300),
    "gsm8k_train.jsonl": (DATASET_FORMAT_QUESTION_ANSWER, 7473),
}


KINDS: dict[str, list[tuple[str, ...]]] = {
    "SUPERVISED": [("",)],
    "PROMPT": [("prompt",)],
    "PREFERENCE": [("chosen", "rejected")],
    "UNPAIRED": [("desirable", "mismatched"), ("undesirable", "mismatched")],
}
"""The roles of a unit's rows."""


def built_of(folder: Path, name: str, most_lines: int = 0) -> tuple[Built, DatasetFormat.ValueType]:
    """Build a version of a file alone, or of its first lines; returns the format that was found too."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the checkout")
    builder = VersionBuilder(folder, SplitSettings(), lambda: None, [SPLIT_UNSPECIFIED])
    with path.open("rb") as file:
        stream = io.BytesIO(b"".join(islice(file, most_lines or None)))
        place = Place(filename=name, split=SPLIT_UNSPECIFIED)
        found = builder.read(stream, place, DATASET_FORMAT_UNSPECIFIED)
    return builder.finish(), found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("alpaca_en_demo.json", "SUPERVISED"),
        ("dpo_en_demo.json", "PREFERENCE"),
        ("kto_en_demo.json", "UNPAIRED"),
        ("glaive_toolcall_en_demo.json", "SUPERVISED"),
        ("gsm8k_train.jsonl", "SUPERVISED"),
        ("gsm8k_train.jsonl", "PROMPT"),
    ],
)
def test_a_real_file_is_rendered_in_its_kind(
    tmp_path: Path, bundle_folder: Path, bundle_files: dict[str, bytes], name: str, kind: str
) -> None:
    """Each record is a unit; what is learnt of it are its answers, to the last letter."""
    built, _ = built_of(tmp_path, name, most_lines=500 if name.endswith(".jsonl") else 0)
    (tmp_path / "rows").mkdir()
    settings = RecordSettings(
        bundle_folder=str(bundle_folder),
        chat_template=TEMPLATE,
        mask_mode="",
        max_tokens=100_000,
        length_policy="DROP",
        template_date="2026-11-23",
        split_turns=False,
        kind=kind,
    )
    spec = RenderSpec(
        dataset_digest="d",
        tokenizer_digest="t",
        template_error_policy=TemplateErrorPolicy.TEMPLATE_ERROR_POLICY_STRICT,
    )
    order = RenderOrder(
        spec=spec,
        shards=tuple(str(shard.path) for shard in built.shards),
        output_folder=str(tmp_path / "rows"),
        records=settings,
    )
    rendered = render(order)
    units: dict[int, list[dict[str, Any]]] = {}
    for row in rendered_rows(rendered):
        units.setdefault(row["unit"], []).append(row)
    records = {row["record_id"]: record_from_json(row["record"]) for row in rows(built)}
    assert len(units) == len(records) == built.statistics.num_records
    assert sum(split.num_units or split.tokens.count for split in rendered.result.split_statistics) == len(
        units
    )
    assert {tuple(row["role"] for row in unit) for unit in units.values()} <= set(KINDS[kind])
    for unit in [*units.values()][:40]:
        assert all(row["filename"] == name for row in unit)
        (record_id,) = {row["record_id"] for row in unit}
        check_learnt(records[record_id], kind, [learnt(row, bundle_files) for row in unit])


def check_learnt(record: Any, kind: str, said: list[str]) -> None:
    """What is learnt of a unit's rows is what its record answers."""
    if kind == "PROMPT":
        assert said == [""]
    elif isinstance(record, ChatPair):
        assert said == [f"{side[-1].content}<|im_end|>" for side in (record.chosen, record.rejected)]
    else:
        assert isinstance(record, ChatRecord)
        answers = [turn for turn in record.messages if turn.role == "assistant"]
        if kind == "UNPAIRED":
            answers = answers[-1:]  # a label is of the last one
        assert all((turn.content or "") in said[0] for turn in answers)
        assert said[0].count("<|im_end|>") == len(answers)
        assert said[0].count("<call>") == sum(len(turn.tool_calls) for turn in answers)


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_goes_in_as_it_is(tmp_path: Path, name: str) -> None:
    wanted, num_records = FILES[name]
    built, found = built_of(tmp_path, name)
    assert DatasetFormat.Name(found) == DatasetFormat.Name(wanted)
    assert built.errors == ()
    counts = built.statistics
    assert (counts.num_invalid, counts.num_records_read) == (0, num_records)
    assert counts.num_records + counts.num_duplicates == num_records
    records = [record_from_json(row["record"]) for row in rows(built)]
    if wanted == DATASET_FORMAT_SHAREGPT_PREFERENCE:
        assert all(isinstance(record, ChatPair) and record.chosen != record.rejected for record in records)
        return
    chats = [record for record in records if isinstance(record, ChatRecord)]
    assert len(chats) == len(records)
    labels = {record.label for record in chats}
    assert labels == ({True, False} if wanted == DATASET_FORMAT_SHAREGPT_UNPAIRED else {None})
    calls = [call for record in chats for turn in record.messages for call in turn.tool_calls]
    assert bool(calls) == bool(any(record.tools for record in chats)) == (wanted == DATASET_FORMAT_SHAREGPT)
