"""Definitions of tools as files write them: a list, or JSON text of one, bare functions or OpenAI's objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.text.fields import RecordError, objects, required_text
from luthier.text.readers import read_json


def read_tools(value: object, path: str) -> tuple[Mapping[str, Any], ...]:
    """Return tools as OpenAI writes them; none for null, an empty text and an empty list.

    A function alone (`name`, most often `description` and `parameters`) becomes `{type: function, function: ...}`.

    Raises:
        RecordError: it is no list of such definitions.
    """
    if isinstance(value, str):
        value = json_value(value, path) if value.strip() else None
    return tuple(_definition(tool, f"{path}[{index}]") for index, tool in enumerate(objects(value, path)))


def json_value(text: str, path: str) -> Any:
    """Return the value of a field that holds JSON text. Raises RecordError INVALID_JSON."""
    try:
        return read_json(text)
    except ValueError as error:
        raise RecordError(path, "INVALID_JSON", f"must be JSON: {error}", text) from error


def _definition(tool: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return tool
    required_text(tool.get("name"), f"{path}.name")
    return {"type": "function", "function": dict(tool)}
