"""Files that announce more than they hold are refused before anything is counted by what they say."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest

from luthier.errors import InvalidArgument, Reason
from luthier.lm.gguf_header import read_header
from luthier.lm.register import register_source
from luthier.lm.sources import GgufSource

HUGE = 1 << 63
U8, U32, TEXT, ARRAY = 0, 4, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(num_pairs: int, num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs)


def pair(kind: int, value: bytes) -> bytes:
    return text("a.b") + struct.pack("<I", kind) + value


LYING = {
    "pairs": (head(HUGE), f"{HUGE} key-value pairs"),
    "tensors": (head(0, HUGE), f"{HUGE} tensors"),
    "a key": (head(1) + struct.pack("<Q", HUGE) + b"general.name" * 9, f"{HUGE} bytes of a key"),
    "a text": (head(1) + pair(TEXT, struct.pack("<Q", HUGE) + b"x"), f"{HUGE} bytes of a text"),
    "numbers": (head(1) + pair(ARRAY, struct.pack("<IQ", U32, HUGE)), f"{HUGE} elements of an array"),
    "bytes": (head(1) + pair(ARRAY, struct.pack("<IQ", U8, 2) + b"x"), "2 elements of an array"),
    "texts": (
        head(1) + pair(ARRAY, struct.pack("<IQ", TEXT, HUGE) + text("x")),
        f"{HUGE} elements of an array",
    ),
    "arrays": (head(1) + pair(ARRAY, struct.pack("<IQ", ARRAY, HUGE)), f"{HUGE} elements of an array"),
    "a text of an array": (
        head(1) + pair(ARRAY, struct.pack("<IQ", TEXT, 1) + struct.pack("<Q", HUGE)),
        f"{HUGE} bytes of a text",
    ),
    "depth": (head(1) + pair(ARRAY, struct.pack("<IQ", ARRAY, 1) * 9), "at most 4 deep"),
    "a kind": (head(1) + pair(77, b"x" * 8), "got kind 77"),
    "an end": (head(1) + pair(U32, b"x"), "1 value cannot lie in the 1 bytes"),
    "no numbers": (b"GGUF\3\0", "1 number cannot lie in the 2 bytes from byte 4 on"),
    "a second pair": (head(2) + pair(U8, b"x") + b"\0" * 3, "2 key-value pairs cannot lie in"),
}


@pytest.mark.parametrize("name", LYING)
def test_a_file_that_announces_more_than_it_holds_is_refused(tmp_path: Path, name: str) -> None:
    content, message = LYING[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_header(path)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert "a.b" not in caught.value.message, "contents are not quoted"


def test_what_it_announces_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(LYING["numbers"][0])
    with pytest.raises(InvalidArgument, match=LYING["numbers"][1]):
        register_source(GgufSource(path=path), tmp_path / "out", scratch=tmp_path / "scratch")


def array(kind: int, count: int, value: bytes) -> bytes:
    return pair(ARRAY, struct.pack("<IQ", kind, count) + value)


TOO_MUCH = {
    "numbers": (head(1) + array(U8, 997, bytes(997)), "1001 with 997 elements"),
    "of several keys": (head(2) + array(U8, 500, bytes(500)) + array(U32, 493, bytes(1972)), "1001 with 493"),
    "texts": (head(1) + array(TEXT, 499, 499 * text("")), "1002 with 499 elements"),
    "arrays": (head(1) + array(ARRAY, 499, 499 * struct.pack("<IQ", U8, 0)), "1002 with 499 elements"),
    "pairs": (head(251) + 251 * pair(U8, b"x"), "1004 with 251 key-value pairs"),
    "tensors": (head(0, 126) + bytes(126 * 24), "1008 with 126 tensors"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_file_of_which_too_many_objects_would_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, message = TOO_MUCH[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    read_header(path)
    monkeypatch.setattr("luthier.lm.gguf_header._MOST_OBJECTS", 1000)
    with pytest.raises(InvalidArgument, match=f"must say at most 1000 things .* got {message}") as caught:
        read_header(path)
    assert caught.value.reason == Reason.MODEL_INVALID


def test_numbers_that_would_take_all_memory_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(head(1) + array(U8, 10_000_000, bytes(10_000_000)))
    with pytest.raises(InvalidArgument, match="at most 10000000 things"):
        read_header(path)


def test_a_vocabulary_of_a_million_tokens_passes(tmp_path: Path) -> None:
    million = 1_000_000
    path = tmp_path / "m.gguf"
    parts = [
        array(TEXT, million, million * text("")),
        array(TEXT, 2 * million, 2 * million * text("")),
        array(U32, million, bytes(4 * million)),
        array(U32, million, bytes(4 * million)),
    ]
    path.write_bytes(head(len(parts)) + b"".join(parts))
    assert read_header(path).end_ids == ()


@pytest.mark.parametrize(
    ("kind", "packed", "expected"),
    [(4, "<I", 0xFFFFFFFF), (5, "<i", -1), (0, "<B", 7), (11, "<q", -(1 << 62))],
)
def test_ends_of_answers_are_read(tmp_path: Path, kind: int, packed: str, expected: int) -> None:
    path = tmp_path / "m.gguf"
    ends = [("eom", 4, struct.pack("<I", 3)), ("eot", kind, struct.pack(packed, expected))]
    pairs = [
        text(f"tokenizer.ggml.{end}_token_id") + struct.pack("<I", one) + value for end, one, value in ends
    ]
    path.write_bytes(head(3) + b"".join(pairs) + pairs[0][:-4] + struct.pack("<I", 9))
    assert read_header(path).end_ids == (expected, 3), "as the package does, the first of a key is taken"


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_every_kind_of_value_is_passed_over(tmp_path: Path, order: gguf.GGUFEndian) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    for kind in ("float32", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "some")
    writer.add_array("a.texts", ["", "one", "two"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.arrays", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    read_header(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 80])
    with pytest.raises(InvalidArgument):
        read_header(path)
