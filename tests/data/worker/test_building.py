import io
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.made_records import lines

from luthier.data.splits import assign_split, split_name
from luthier.data.worker import building
from luthier.data.worker.building import Built, VersionBuilder, require_valid
from luthier.data.worker.splitting import Place
from luthier.errors import InvalidArgument, Reason
from luthier.text import readers
from luthier.text.formats import Format
from luthier.text.records import ChatRecord, Record, prompt_id, record_from_json, record_id
from luthier.text.templates import ChatTemplate
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_UNSPECIFIED,
    SPLIT_TEST,
    SPLIT_TRAIN,
    SPLIT_UNSPECIFIED,
    DatasetFormat,
    InvalidRecordPolicy,
    Split,
    SplitSettings,
)

PLAIN = SplitSettings()
SHARED = SplitSettings(validation_fraction=0.3, test_fraction=0.2, seed=5)


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def build(
    folder: Path,
    *sources: bytes | tuple[bytes, Split.ValueType],
    splitting: SplitSettings = PLAIN,
    format_: DatasetFormat.ValueType = DATASET_FORMAT_UNSPECIFIED,
) -> Built:
    folder.mkdir(parents=True, exist_ok=True)
    placed = [source if isinstance(source, tuple) else (source, SPLIT_UNSPECIFIED) for source in sources]
    builder = VersionBuilder(folder, splitting, lambda: None, [split for _, split in placed])
    for index, (data, split) in enumerate(placed):
        builder.read(io.BytesIO(data), Place(filename=f"{index}.jsonl", split=split), format_)
    return builder.finish()


def rows(built: Built) -> list[dict[str, Any]]:
    return [row for shard in built.shards for row in pyarrow.parquet.read_table(shard.path).to_pylist()]


def test_build_writes_canonical_records_with_their_place(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    built = build(tmp_path, lines(chat) + b"\n" + lines({**chat, "tools": []}, chat))
    assert [(row["row"], row["filename"], row["line"], row["split"]) for row in rows(built)] == [
        (0, "0.jsonl", 1, "TRAIN")
    ]
    assert json.loads(rows(built)[0]["record"]) == chat
    assert built.statistics.num_duplicates == 2
    assert built.statistics.num_records_read == 3
    assert built.statistics.splits[0].num_characters == len("hihello")
    assert built.statistics.splits[0].num_messages == 2


def test_build_names_records_as_text_does(tmp_path: Path) -> None:
    (row,) = rows(build(tmp_path, lines(pair(1))))
    assert row["record_id"] == record_id(record_from_json(row["record"]))


def test_build_reads_one_json_array(tmp_path: Path) -> None:
    alpaca = [{"instruction": f"do {n}", "input": "", "output": "done"} for n in range(3)]
    built = build(tmp_path, json.dumps(alpaca, indent=1).encode())
    assert built.statistics.num_records == 3
    assert [row["line"] for row in rows(built)] == [2, 7, 12]


def test_build_keeps_the_first_of_equal_records_also_across_fixed_splits(tmp_path: Path) -> None:
    built = build(tmp_path, (lines(pair(1), pair(2)), SPLIT_TEST), (lines(pair(2), pair(3)), SPLIT_TRAIN))
    assert [(row["filename"], row["line"], row["split"]) for row in rows(built)] == [
        ("0.jsonl", 1, "TEST"),
        ("0.jsonl", 2, "TEST"),
        ("1.jsonl", 2, "TRAIN"),
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 500), unique=True, min_size=1, max_size=30),
    st.lists(st.integers(0, 500), unique=True, max_size=30),
)
def test_build_with_more_rows_leaves_old_rows_in_their_split(
    tmp_path: Path, old: list[int], added: list[int]
) -> None:
    def splits(numbers: Sequence[int], name: str) -> dict[Record, str]:
        built = build(tmp_path / name, lines(*map(pair, numbers)), splitting=SHARED)
        return {record_from_json(row["record"]): row["split"] for row in rows(built)}

    folder = str(len(list(tmp_path.iterdir())))
    before = splits(old, f"{folder}-old")
    after = splits([*added, *old], f"{folder}-new")
    assert {record: after[record] for record in before} == before
    assert all(
        split_name(assign_split(str(prompt_id(record)), SHARED)) == split for record, split in after.items()
    )


def test_build_digest_depends_on_content_order_and_settings_alone(tmp_path: Path) -> None:
    one = build(tmp_path / "1", lines(pair(1), pair(2)), splitting=SHARED)
    split_files = build(tmp_path / "2", lines(pair(1)), lines(pair(1), pair(2)), splitting=SHARED)
    swapped = build(tmp_path / "3", lines(pair(2), pair(1)), splitting=SHARED)
    other_seed = SplitSettings(validation_fraction=0.3, test_fraction=0.2, seed=6)
    seeded = build(tmp_path / "4", lines(pair(1), pair(2)), splitting=other_seed)
    assert one.digest == split_files.digest
    assert len({one.digest, swapped.digest, seeded.digest}) == 3


def test_build_digest_tells_orders_of_keys_apart_as_templates_do(tmp_path: Path) -> None:
    """They are one record where both come, and what is rendered of the one that is kept differs."""
    parameters = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    turned = {"function": {"parameters": parameters, "name": "f"}, "type": "function"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    first, second = ({"messages": turns, "tools": [one]} for one in (tool, turned))
    one, other, both = (
        build(tmp_path / str(number), lines(*records))
        for number, records in enumerate(([first], [second], [first, second]))
    )
    assert [row["record_id"] for row in rows(one)] == [row["record_id"] for row in rows(other)]
    template = ChatTemplate("{{ tools | tojson }}", date(2026, 1, 1))
    texts = []
    for built in (one, other):
        record = record_from_json(rows(built)[0]["record"])
        assert isinstance(record, ChatRecord)
        texts.append(template.render([], tools=record.tools).text)
    assert texts[0] != texts[1]
    assert one.digest != other.digest
    assert (both.digest, both.statistics.num_duplicates) == (one.digest, 1)


def test_build_splits_shards_and_numbers_rows_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.worker.parquet.GROUP_ROWS", 4)
    monkeypatch.setattr("luthier.data.worker.parquet.SHARD_ROWS", 10)
    built = build(tmp_path, lines(*map(pair, range(25))))
    assert [(shard.first_row, shard.num_rows) for shard in built.shards] == [(0, 10), (10, 10), (20, 5)]
    assert [row["row"] for row in rows(built)] == list(range(25))
    groups = pyarrow.parquet.ParquetFile(built.shards[0].path).metadata
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [4, 4, 2]


def test_build_of_an_empty_file_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"\n\n  \n", b"[]"):
        with pytest.raises(InvalidArgument) as caught:
            build(tmp_path / str(len(data)), data)
        assert caught.value.reason == Reason.EMPTY_FILE
        assert caught.value.message == "0.jsonl must hold at least one record, it is empty"


def test_build_of_an_unknown_format_names_the_keys_found_and_the_formats_known(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        build(tmp_path, lines({"query": "q", "answer": "a"}))
    assert caught.value.reason == Reason.UNKNOWN_FORMAT
    assert "answer, query" in caught.value.message
    for known in Format:
        assert f"{known}: " in caught.value.message


def test_build_reports_each_bad_record_and_goes_on(tmp_path: Path) -> None:
    bad_role = {"messages": [{"role": "robot", "content": "x"}]}
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    order = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]}
    built = build(tmp_path, lines(good) + b'{"messages": [\n' + lines(bad_role, {"msgs": []}, order))
    assert [(error.line, error.path, error.reason) for error in built.errors] == [
        (2, "", "INVALID_JSON"),
        (3, "messages[0].role", "UNKNOWN_ROLE"),
        (4, "messages", "MISSING_FIELD"),
        (5, "messages[1].role", "WRONG_ROLE_ORDER"),
    ]
    assert built.errors[1].value == "'robot'"
    assert built.statistics.num_invalid == 4
    assert built.statistics.num_records == 1


def test_build_of_nothing_but_broken_json_reports_the_lines(tmp_path: Path) -> None:
    built = build(tmp_path, b"{nope\n{never\n")
    assert [error.line for error in built.errors] == [1, 2]
    with pytest.raises(InvalidArgument, match=r"2 of 2 records are not valid, the first at 0.jsonl:1"):
        require_valid(built, InvalidRecordPolicy.INVALID_RECORD_POLICY_SKIP)


def test_build_of_an_array_that_breaks_off_is_refused_also_where_bad_records_are_skipped(
    tmp_path: Path,
) -> None:
    data = json.dumps([pair(1), pair(2)]).encode()
    built = build(tmp_path, data[:-2])
    assert (built.statistics.num_records, built.statistics.num_invalid) == (1, 1)
    with pytest.raises(InvalidArgument, match=r"the first at 0.jsonl:1: .*nothing after it can be read"):
        require_valid(built, InvalidRecordPolicy.INVALID_RECORD_POLICY_SKIP)


def test_build_keeps_the_first_thousand_errors_and_counts_all(tmp_path: Path) -> None:
    built = build(tmp_path, lines(pair(0)) + b"{\n" * 1500)
    assert len(built.errors) == 1000
    assert built.statistics.num_invalid == 1500


def test_build_refuses_text_that_is_no_unicode_and_records_too_long_to_send(tmp_path: Path) -> None:
    surrogate = b'{"prompt": "a\\ud800", "completion": "b"}\n'
    long = lines({"prompt": "x" * building.MAX_RECORD_BYTES, "completion": "b"})
    built = build(tmp_path, surrogate + long + lines(pair(1)))
    assert [error.reason for error in built.errors] == ["INVALID_TEXT", "RECORD_TOO_LONG"]
    assert "U+D800" in built.errors[0].message
    assert str(building.MAX_RECORD_BYTES) in built.errors[1].message
    assert built.statistics.num_records == 1


def test_require_valid_names_the_first_bad_record_and_their_number(tmp_path: Path) -> None:
    built = build(tmp_path, lines(pair(1), {"prompt": 3, "completion": "b"}, {"prompt": "a"}))
    require_valid(built, InvalidRecordPolicy.INVALID_RECORD_POLICY_SKIP)
    with pytest.raises(InvalidArgument) as caught:
        require_valid(built, InvalidRecordPolicy.INVALID_RECORD_POLICY_STRICT)
    assert caught.value.reason == Reason.INVALID_RECORDS
    assert caught.value.message == (
        "2 of 3 records are not valid, the first at 0.jsonl:2: prompt: must be text, got a number"
    )
    assert caught.value.metadata["num_invalid"] == "2"
    assert caught.value.metadata["skippable"] == "true"


def test_build_stops_when_nobody_wants_it(tmp_path: Path) -> None:
    class Unwanted(Exception):
        pass

    calls = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Unwanted

    builder = VersionBuilder(tmp_path, PLAIN, tick, [SPLIT_UNSPECIFIED])
    data = lines(*map(pair, range(10_000)))
    with pytest.raises(Unwanted):
        builder.read(
            io.BytesIO(data), Place(filename="f", split=SPLIT_UNSPECIFIED), DATASET_FORMAT_UNSPECIFIED
        )


def test_build_of_a_pretty_printed_file_is_refused_once_whatever_the_policy(tmp_path: Path) -> None:
    built = build(tmp_path, b"\n".join(json.dumps(pair(number), indent=2).encode() for number in range(3)))
    assert [(error.line, error.reason) for error in built.errors] == [(1, "PRETTY_PRINTED_JSON")]
    for policy in InvalidRecordPolicy.values():
        with pytest.raises(
            InvalidArgument, match=r"1 of 1 .* 0\.jsonl:1: .*pretty-printed JSON.*lines 1 to 4"
        ):
            require_valid(built, policy)


def test_build_skips_a_line_that_is_too_long_to_read(tmp_path: Path) -> None:
    built = build(tmp_path, lines({"prompt": "x" * readers.MAX_RECORD_BYTES, "completion": "b"}, pair(1)))
    assert [(error.line, error.reason) for error in built.errors] == [(1, "RECORD_TOO_LONG")]
    assert built.statistics.num_records == 1
    require_valid(built, InvalidRecordPolicy.INVALID_RECORD_POLICY_SKIP)


def test_build_shows_nothing_of_a_record_that_could_steer_a_terminal(tmp_path: Path) -> None:
    hostile = {"messages": [{"role": "user", "content": "q", "\x1b]0;owned\x07\u009b": 1}]}
    (error,) = build(tmp_path, lines(hostile)).errors
    assert error.path == r"messages[0].\x1b]0;owned\x07\x9b"
    assert all(part.isprintable() for part in (error.path, error.message, error.value))
