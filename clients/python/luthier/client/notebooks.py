"""How resources look in notebooks: tables of HTML in place of the text of a message.

Messages have no room for a `_repr_html_`, so their looks are told to IPython: by the first client that is made in a
notebook, or by `%load_ext luthier.client.notebooks`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from google.api import resource_pb2
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue

from luthier.client.escaping import escaped_html
from luthier.client.names import short

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGE = "luthier.v1."
MOST_ROWS = 50
"""Of a list that are shown."""
_MOST_CHARACTERS = 300
_FIRST = ("name", "state", "display_name")
_COLUMNS = (
    "name",
    "state",
    "display_name",
    "kind",
    "base_model",
    "rendering",
    "dataset_version",
    "current",
    "step",
    "create_time",
)
"""Of a list of resources, those that they have. Lists of anything else show all that is said."""
_HIDDEN = frozenset({"uid", "etag", "update_time"})
_COLOURS = {"SUCCEEDED": "#1a7f37", "READY": "#1a7f37", "FAILED": "#cf222e", "CANCELLED": "#9a6700"}


def load_ipython_extension(ipython: Any) -> None:
    """Have a notebook show messages of Luthier, and lists of them, as tables."""
    html = ipython.display_formatter.formatters["text/html"]
    html.for_type(Message, resource_html)
    html.for_type(list, list_html)
    html.for_type(tuple, list_html)
    html.for_type(type(ListValue().values), list_html)


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
    known = _of_one_kind(messages)
    if known is None:
        return None
    left_out = f", the first {MOST_ROWS} of them" if len(known) > MOST_ROWS else ""
    return _messages_table(known[:MOST_ROWS], f"{len(known)} of {known[0].DESCRIPTOR.name}{left_out}")


def listing_html(messages: Sequence[object]) -> str | None:
    """Return the first messages of a listing as a table, which goes on where they are more than MOST_ROWS."""
    if len(messages) <= MOST_ROWS:
        return list_html(messages) if messages else "<p>0 items</p>"
    known = _of_one_kind(messages)
    if known is None:
        return None
    return _messages_table(known[:MOST_ROWS], f"the first {MOST_ROWS} of {known[0].DESCRIPTOR.name}")


def _of_one_kind(messages: Sequence[object]) -> list[Message] | None:
    # Every list that a notebook shows comes by: long ones of anything else are not walked.
    if not messages or not isinstance(messages[0], Message):
        return None
    known = [one for one in messages if isinstance(one, Message)]
    names = {one.DESCRIPTOR.full_name for one in known}
    is_ours = len(names) == 1 and next(iter(names)).startswith(_PACKAGE)
    return known if is_ours and len(known) == len(messages) else None


def _messages_table(messages: Sequence[Message], caption: str) -> str:
    columns = _columns(messages)
    rows = []
    for one in messages:
        said = MessageToDict(one, preserving_proto_field_name=True)
        rows.append([_shown(one, name, said.get(name, _unsaid(one, name))) for name in columns])
    return _table(columns, rows, caption)


def _columns(messages: Sequence[Message]) -> list[str]:
    """Return the fields that at least one of the messages has: of resources the few that tell them apart."""
    said = {field.name for one in messages for field, _ in one.ListFields()}
    fields = messages[0].DESCRIPTOR.fields_by_name
    if _is_resource(messages[0]):
        return [name for name in _COLUMNS if name in said] or ["name"]
    return [name for name in fields if name in said and name not in _HIDDEN] or list(fields)


def _unsaid(message: Message, name: str) -> str:
    """Return what a field without a value says: of a number that it is 0."""
    value = getattr(message, name)
    field = message.DESCRIPTOR.fields_by_name[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and field.enum_type is None
    return "0" if is_number and not field.has_presence else ""


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
    if name == "state" and value and isinstance(value, str):
        state = value.removeprefix("STATE_")
        return f"<b style='color:{_COLOURS.get(state, '#0969da')}'>{escaped_html(state)}</b>"
    if isinstance(value, str):
        text = short(value) if _is_resource_name(message, name) else value
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


def _is_resource_name(message: Message, name: str) -> bool:
    """Whether a field names a resource: other texts may look as if they did, and are shown whole."""
    holder = message.DESCRIPTOR
    if holder.fields_by_name[name].GetOptions().HasExtension(resource_pb2.resource_reference):
        return True
    return name == "name" and _is_resource(message)


def _is_resource(message: Message) -> bool:
    """Whether a message is a resource, or speaks of one: it has a name that is given again, and a uid that is not."""
    return {"name", "uid"} <= set(message.DESCRIPTOR.fields_by_name)
