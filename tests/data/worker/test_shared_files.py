"""Real files of other projects, as they are: they lie beside some checkouts and are no part of this one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.worker.test_building import rows

from luthier.data.worker.building import VersionBuilder
from luthier.data.worker.splitting import Place
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

FOLDER = Path(__file__).parents[4] / "shared" / "data"
FILES = {
    "alpaca_en_demo.json": (DATASET_FORMAT_ALPACA, 999),
    "dpo_en_demo.json": (DATASET_FORMAT_SHAREGPT_PREFERENCE, 300),
    "kto_en_demo.json": (DATASET_FORMAT_SHAREGPT_UNPAIRED, 300),
    "glaive_toolcall_en_demo.json": (DATASET_FORMAT_SHAREGPT, 300),
    "gsm8k_train.jsonl": (DATASET_FORMAT_QUESTION_ANSWER, 7473),
}


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_goes_in_as_it_is(tmp_path: Path, name: str) -> None:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the checkout")
    wanted, num_records = FILES[name]
    builder = VersionBuilder(tmp_path, SplitSettings(), lambda: None, [SPLIT_UNSPECIFIED])
    with path.open("rb") as stream:
        place = Place(filename=name, split=SPLIT_UNSPECIFIED)
        found = builder.read(stream, place, DATASET_FORMAT_UNSPECIFIED)
    built = builder.finish()
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
