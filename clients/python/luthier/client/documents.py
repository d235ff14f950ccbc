"""YAML and JSON as they are written: nodes that know their place, whose words are not yet given a meaning.

YAML guesses from its spelling what a word is: `no` is False to some readers, `1e-4` a string, `1.10` a number. Here
nothing is guessed: a `Scalar` keeps its text, and the field that it is for says how to read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from luthier.client.escaping import escaped_line
from luthier.errors import InvalidArgument

MAX_BYTES = 4 * 1024 * 1024
"""Size of a file at most: no service takes a larger message."""

_MAX_DEPTH = 64
_SHOWN_CHARACTERS = 60
# Of text that is known to be JSON.
_JSON_TOKEN = re.compile(r'\s+|[{}\[\],:]|"[^"\\]*(?:\\.[^"\\]*)*"|[^\s{}\[\],:"]+', re.DOTALL)
_NULLS = {"plain": ("", "~", "null", "Null", "NULL"), "json": ("null",), "quoted": ()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A word or a quoted string. `style`: `quoted`, `plain` (YAML without quotes) or `json` (JSON without quotes)."""

    where: str
    text: str
    style: Literal["quoted", "plain", "json"]

    @property
    def is_null(self) -> bool:
        """Whether it says that nothing is set."""
        return self.text in _NULLS[self.style]

    def __str__(self) -> str:
        return f'"{shown(self.text)}"' if self.style == "quoted" else shown(self.text) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """A list."""

    where: str
    items: tuple[Node, ...]

    def __str__(self) -> str:
        return f"a list of {len(self.items)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Keys with their values, in the order in which they are written; nothing says that the keys differ."""

    where: str
    pairs: tuple[tuple[Scalar, Node], ...]

    def __str__(self) -> str:
        return f"a mapping of {len(self.pairs)}"


Node: TypeAlias = Scalar | Sequence | Mapping


def shown(text: str) -> str:
    """Return a text for an error message: on one line, shortened, and such that it can be printed."""
    short = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return escaped_line(short).encode("utf-8", "backslashreplace").decode()


def read_document(data: bytes, source: str) -> Node:
    """Read YAML 1.1, less anchors and tags, or JSON. `source` is what places are called by: `job.yaml` in `job.yaml:3`.

    Raises InvalidArgument that names the line.
    """
    if len(data) > MAX_BYTES:
        raise InvalidArgument(f"{source}: must have at most {MAX_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidArgument(
            f"{source}:{line}: must be UTF-8, got byte 0x{data[error.start]:02x}"
        ) from error
    try:
        if _is_json(text, source):
            tokens = _json_tokens(text, source)
            return _read_json(tokens, *next(tokens), 0)
        return _read_yaml(text, source)
    except RecursionError as error:
        raise InvalidArgument(f"{source}: must be at most {_MAX_DEPTH} levels deep") from error


def _is_json(text: str, source: str) -> bool:
    if not source.endswith(".json") and not text.lstrip().startswith(("{", "[")):
        return False
    try:
        # Numbers are only looked over here: one of a million digits is for its field to refuse.
        json.loads(text, parse_int=str, parse_float=str)
    except json.JSONDecodeError as error:
        if source.endswith(".json"):
            message = f"{source}:{error.lineno}: is not JSON: {error.msg}, column {error.colno}"
            raise InvalidArgument(message) from error
        return False
    return True


def _json_tokens(text: str, source: str) -> Iterator[tuple[str, str]]:
    line = 1
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if not token.isspace():
            yield f"{source}:{line}", token
        line += token.count("\n")


def _read_json(tokens: Iterator[tuple[str, str]], where: str, token: str, depth: int) -> Node:
    _check_depth(where, depth)
    if token == "[":
        items = []
        for place, word in tokens:
            if word == "]":
                break
            if word != ",":
                items.append(_read_json(tokens, place, word, depth + 1))
        return Sequence(where=where, items=tuple(items))
    if token == "{":
        pairs = []
        for place, word in tokens:
            if word == "}":
                break
            if word != ",":
                next(tokens)
                key = Scalar(where=place, text=json.loads(word), style="quoted")
                pairs.append((key, _read_json(tokens, *next(tokens), depth + 1)))
        return Mapping(where=where, pairs=tuple(pairs))
    if token.startswith('"'):
        return Scalar(where=where, text=json.loads(token), style="quoted")
    return Scalar(where=where, text=token, style="json")


def _read_yaml(text: str, source: str) -> Node:
    import yaml

    # The parser in Python, not libyaml's: it is the same wherever PyYAML is.
    events = yaml.parse(text, Loader=yaml.BaseLoader)
    try:
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            raise InvalidArgument(f"{source}: is empty")
        node = _read_yaml_node(events, next(events), source, 0)
        next(events)
        if not isinstance(following := next(events), yaml.StreamEndEvent):
            raise InvalidArgument(f"{_place(source, following)}: must be one document, got a second one")
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise InvalidArgument(f"{place}: is not YAML: {problem}") from error
    except yaml.reader.ReaderError as error:
        place = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        raise InvalidArgument(f"{place}: is not YAML: {error.reason}, got U+{error.character:04X}") from error


def _read_yaml_node(events: Iterator[Any], event: Any, source: str, depth: int) -> Node:
    import yaml

    where = _place(source, event)
    _check_depth(where, depth)
    if isinstance(event, yaml.AliasEvent):
        raise InvalidArgument(f"{where}: *{event.anchor} must be written out: anchors are not followed")
    if event.tag is not None:
        raise InvalidArgument(f"{where}: must have no tag, got {event.tag}: its field says what a value is")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(where=where, text=event.value, style="plain" if event.style is None else "quoted")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_read_yaml_node(events, event, source, depth + 1))
        return Sequence(where=where, items=tuple(items))
    pairs = []
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _read_yaml_node(events, event, source, depth + 1)
        if not isinstance(key, Scalar):
            raise InvalidArgument(
                f"{key.where}: must be a key, got {key}: text that begins with {{ or [ needs quotes"
            )
        pairs.append((key, _read_yaml_node(events, next(events), source, depth + 1)))
    return Mapping(where=where, pairs=tuple(pairs))


def _place(source: str, event: Any) -> str:
    return f"{source}:{event.start_mark.line + 1}"


def _check_depth(where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise InvalidArgument(f"{where}: must be at most {_MAX_DEPTH} levels deep")
