"""How resources look in notebooks: tables of HTML in place of the text of a message.

Messages have no room for a `_repr_html_`, so their looks are told to IPython: by the first client that is made in a
notebook, or by `%load_ext luthier.client.notebooks`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from luthier.client.escaping import escaped_html
from luthier.client.names import short

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGE = "luthier.v1."
_MOST_CHARACTERS = 300
_MOST_ROWS = 50
_FIRST = ("name", "state", "display_name")
_COLUMNS = ("name", "state", "kind", "base_model", "rendering", "dataset_version", "step", "create_time")
"""Of a list of resources, those that they have."""
_HIDDEN = frozenset({"uid", "etag", "update_time"})
_COLOURS = {"SUCCEEDED": "#1a7f37", "READY": "#1a7f37", "FAILED": "#cf222e", "CANCELLED": "#9a6700"}


def load_ipython_extension(ipython: Any) -> None:
    """Have a notebook show messages of Luthier, and lists of them, as tables."""
    html = ipython.display_formatter.formatters["text/html"]
    html.for_type(Message, resource_html)
    html.for_type(list, list_html)
    html.for_type(tuple, list_html)


def register() -> None:
    """Do so where this process is a notebook, or another shell of IPython; nothing else is imported for it."""
    ipython = sys.modules.get("IPython")
    shell: Callable[[], Any] | None = getattr(ipython, "get_ipython", None)
    found = shell() if shell is not None else None
    if found is not None and getattr(found, "display_formatter", None) is not None:
        load_ipython_extension(found)


def resource_html(message: Message) -> str | None:
    """Return a message of Luthier as a table, a row for each field that says something; None for others' messages."""
    if not message.DESCRIPTOR.full_name.startswith(_PACKAGE):
        return None
    said = MessageToDict(message, preserving_proto_field_name=True)
    ordered = [name for name in _FIRST if name in said] + [name for name in said if name not in _FIRST]
    rows = "".join(
        f"<tr><th style='text-align:left'>{escaped_html(name)}</th>"
        f"<td style='text-align:left'>{_shown(message, name, said[name])}</td></tr>"
        for name in ordered
        if name not in _HIDDEN
    )
    return f"<table><caption>{escaped_html(message.DESCRIPTOR.name)}</caption>{rows}</table>"


def list_html(messages: Sequence[object]) -> str | None:
    """Return messages of one kind of Luthier as a table; None for lists of anything else, which are shown as ever."""
    first = messages[0] if messages else None
    if not isinstance(first, Message) or not first.DESCRIPTOR.full_name.startswith(_PACKAGE):
        return None
    kind = type(first)
    if not all(isinstance(one, kind) for one in messages):
        return None
    columns = [name for name in _COLUMNS if name in first.DESCRIPTOR.fields_by_name]
    if not columns:
        columns = [field.name for field in first.DESCRIPTOR.fields]
    rows = []
    for one in messages[:_MOST_ROWS]:
        assert isinstance(one, Message)
        said = MessageToDict(one, preserving_proto_field_name=True)
        rows.append([_shown(one, name, said[name]) if name in said else "" for name in columns])
    left_out = f", the first {_MOST_ROWS} of them" if len(messages) > _MOST_ROWS else ""
    return _table(columns, rows, f"{len(messages)} of {first.DESCRIPTOR.name}{left_out}")


def rows_html(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Return a table of texts, none of which is taken for HTML."""
    return _table(columns, [[escaped_html(cell) for cell in row] for row in rows], caption)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    head = "".join(f"<th>{escaped_html(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<table><caption>{escaped_html(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _shown(message: Message, name: str, value: Any) -> str:
    """Return a field as HTML: states in colour, short names, what is long folded away."""
    if name == "state" and isinstance(value, str):
        state = value.removeprefix("STATE_")
        return f"<b style='color:{_COLOURS.get(state, '#0969da')}'>{escaped_html(state)}</b>"
    if isinstance(value, str):
        text = short(value) if message.DESCRIPTOR.fields_by_name[name].message_type is None else value
    else:
        text = (
            json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, dict | list) else str(value)
        )
    if len(text) <= _MOST_CHARACTERS:
        return escaped_html(text)
    return (
        f"<details><summary>{escaped_html(text[:60])}…</summary>"
        f"<pre style='text-align:left'>{escaped_html(text)}</pre></details>"
    )
