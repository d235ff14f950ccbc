"""YAML and JSON as nodes: nothing guessed, nothing lost, every error with its line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.client.documents import MAX_BYTES, Mapping, Node, Scalar, Sequence, read_document
from luthier.errors import InvalidArgument

# Lone halves of surrogate pairs are no text.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS
)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_TEXTS, inner), max_leaves=20
)


def as_json(node: Node) -> object:
    """What Python's JSON reads where the node was read."""
    if isinstance(node, Sequence):
        return [as_json(item) for item in node.items]
    if isinstance(node, Mapping):
        return {key.text: as_json(value) for key, value in node.pairs}
    return node.text if node.style == "quoted" else json.loads(node.text)


def read(text: str, source: str = "a.yaml") -> Node:
    return read_document(text.encode(), source)


@settings(max_examples=60)
@given(_VALUES, st.booleans(), st.sampled_from([None, 2, "\t"]))
def test_read_document_reads_every_json_text_as_it_is(
    value: object, ensure_ascii: bool, indent: int | str | None
) -> None:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
    assert as_json(read(text, "a.json")) == value
    if isinstance(value, list | dict):
        # Also where nothing says that it is JSON: white space around U+2028 would be lost to a reader of YAML.
        assert as_json(read(text, "<stdin>")) == value


def test_read_document_counts_lines_of_json_and_yaml() -> None:
    for text in ('{\n"a": [1,\n\n"x"],\n"b": {}}', "a:\n- 1\n\n- x\nb: {}"):
        node = read(text)
        assert isinstance(node, Mapping)
        (first, numbers), (second, inner) = node.pairs
        assert isinstance(numbers, Sequence)
        places = [int(one.where.removeprefix("a.yaml:")) for one in (first, *numbers.items, second, inner)]
        assert places == ([2, 2, 4, 5, 5] if text.startswith("{") else [1, 2, 4, 5, 5])


def test_read_document_leaves_yaml_words_as_they_are() -> None:
    node = read("[no, 1e-4, 1.10, 2026-11-28, 0o7, 1_000, 12:30, ~, 'no', on, .inf]")
    assert isinstance(node, Sequence)
    scalars = [item for item in node.items if isinstance(item, Scalar)]
    assert [one.text for one in scalars] == [
        "no",
        "1e-4",
        "1.10",
        "2026-11-28",
        "0o7",
        "1_000",
        "12:30",
        "~",
        "no",
        "on",
        ".inf",
    ]
    assert [index for index, one in enumerate(scalars) if one.style == "quoted"] == [8]
    assert [index for index, one in enumerate(scalars) if one.is_null] == [7]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a.yaml: is empty"),
        ("# nothing\n", "a.yaml: is empty"),
        ("a: &x 1\nb: *x", "a.yaml:2: *x must be written out: anchors are not followed"),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]",
            "a.yaml:2: must have no tag, got tag:yaml.org,2002:python",
        ),
        ("a: 1\n---\nb: 1", "a.yaml:2: must be one document, got a second one"),
        ("a: 1\n b: 1", "a.yaml:2: is not YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1", "a.yaml:2: is not YAML: while scanning for the next token found character '\\t'"),
        ("a: 1\nb: \x07", "a.yaml:2: is not YAML: special characters are not allowed, got U+0007"),
        (
            "a: {{ b }}",
            "a.yaml:1: must be a key, got a mapping of 1: text that begins with { or [ needs quotes",
        ),
        ("{'a': 1", "a.yaml:1: is not YAML: while parsing a flow mapping expected ',' or '}'"),
        ("- " * 1000, "a.yaml:1: must be at most 64 levels deep"),
        ("[" * 100, "a.yaml:1: must be at most 64 levels deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "a.yaml:1: must be at most 64 levels deep"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "a.yaml: must be at most 64 levels deep"),
    ],
)
def test_read_document_refuses_with_the_line(text: str, problem: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        read(text)
    assert raised.value.message.startswith(problem)


def test_read_document_refuses_broken_json_as_json() -> None:
    with pytest.raises(InvalidArgument, match=r"^a\.json:2: is not JSON: Expecting ':' delimiter, column 5$"):
        read('{"a": 1,\n"b" 2}', "a.json")


def test_read_document_does_not_expand_bombs() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    with pytest.raises(InvalidArgument, match="anchors are not followed"):
        read(bomb)


def test_read_document_refuses_other_bytes_and_too_many() -> None:
    with pytest.raises(InvalidArgument, match=r"^a\.yaml:2: must be UTF-8, got byte 0xff$"):
        read_document(b"a: 1\nb: \xff", "a.yaml")
    with pytest.raises(InvalidArgument, match=r"^a\.yaml: must have at most 4,194,304 bytes$"):
        read_document(b"a" * (MAX_BYTES + 1), "a.yaml")


def test_read_document_takes_a_byte_order_mark() -> None:
    assert as_json(read_document('\ufeff{"a": "b"}'.encode(), "a.json")) == {"a": "b"}
