"""Fields of a record's JSON: read strictly, refused by path, value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_VALUE_CHARACTERS = 200


class RecordError(ValueError):
    """What is wrong with one record.

    Attributes:
        path: where in the record, e.g. messages[2].role; empty for the record as a whole.
        reason: code that a program can switch on, e.g. MISSING_FIELD.
        message: what is wrong and what would be right.
        value: the offending value, shortened.
    """

    def __init__(self, path: str, reason: str, message: str, value: object = None) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path = path
        self.reason = reason
        self.message = message
        self.value = "" if value is None else repr(value)[:MAX_VALUE_CHARACTERS]


def required_text(value: object, path: str) -> str:
    """Return a text that says something.

    Raises:
        RecordError: it is missing, no text, or nothing but white space.
    """
    if not isinstance(value, str):
        reason = "MISSING_FIELD" if value is None else "WRONG_TYPE"
        raise RecordError(path, reason, f"must be text, got {kind(value)}", value)
    if not value.strip():
        raise RecordError(path, "EMPTY_FIELD", "must not be empty", value)
    return value


def optional_text(value: object, path: str) -> str | None:
    """Return a text, None for null. Raises RecordError for anything else."""
    if value is None or isinstance(value, str):
        return value
    raise RecordError(path, "WRONG_TYPE", f"must be text, got {kind(value)}", value)


def objects(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    """Return a list of JSON objects, empty for null. Raises RecordError for anything else."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RecordError(path, "WRONG_TYPE", f"must be a list of JSON objects, got {kind(value)}", value)
    return tuple(value)


def kind(value: object) -> str:
    """Return what a JSON value is, in words."""
    if isinstance(value, Mapping):
        return "an object"
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)
