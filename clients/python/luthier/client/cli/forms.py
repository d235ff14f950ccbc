"""How a command writes what it found: for people, or for programs as JSON, YAML or names."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import click

from luthier.client.escaping import escaped, escaped_json, escaped_line

if TYPE_CHECKING:
    from google.protobuf.message import Message

R = TypeVar("R")
Form = Literal["text", "wide", "json", "yaml", "name"]
"""Tables and facts; the same with all details; proto JSON; the same as YAML; nothing but names of resources."""
FORMS: tuple[Form, ...] = get_args(Form)
FOR_PEOPLE: tuple[Form, ...] = ("text", "wide")
_CHOICES = [form for form in FORMS if form != "text"]


def output_options(
    choose: Callable[[click.Context, Form], None],
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command --json and -o; what stands there is chosen as soon as it is read."""

    def switch(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            choose(ctx, "json")

    def pick(ctx: click.Context, _: click.Parameter, value: Form | None) -> None:
        if value is not None:
            choose(ctx, value)

    json_option = click.option(
        "--json", is_flag=True, expose_value=False, callback=switch, help="Write proto JSON to stdout."
    )
    output = click.option(
        "-o",
        "--output-form",
        "shown_as",
        type=click.Choice(_CHOICES),
        expose_value=False,
        callback=pick,
        help="wide: with all details; json: as --json; yaml: the same as YAML; name: names alone.",
    )

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        return output(json_option(function))

    return decorate


def one(message: Message, form: Form) -> str:
    """Return one message for programs. Raises UsageError where names are wanted and it has none."""
    if form == "name":
        return _name(message)
    return _as_yaml(_as_dict(message)) if form == "yaml" else _as_json(_as_dict(message), indent=2)


def several(messages: list[Message], form: Form) -> str:
    """Return messages for programs: an array, or a name a line. Raises as `one`."""
    if form == "name":
        return "\n".join(_name(message) for message in messages)
    values = [_as_dict(message) for message in messages]
    return _as_yaml(values) if form == "yaml" else _as_json(values, indent=2)


def entry(message: Message, form: Form) -> str:
    """Return one message of a stream for programs: a line of JSON, or a document of YAML."""
    return f"---\n{_as_yaml(_as_dict(message))}" if form == "yaml" else _as_json(_as_dict(message))


def plain(values: Any, form: Form) -> str:
    """Return what is no message for programs: lists and tables of texts and numbers, as YAML or JSON."""
    return _as_yaml(values) if form == "yaml" else _as_json(values, indent=2)


def _name(message: Any) -> str:
    if "name" not in message.DESCRIPTOR.fields_by_name:
        raise click.UsageError(f"-o name is for what has a name: a {message.DESCRIPTOR.name} has none")
    return escaped_line(message.name)


def _as_json(values: Any, indent: int | None = None) -> str:
    return escaped_json(json.dumps(values, indent=indent, ensure_ascii=False))


def _as_yaml(values: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    if escaped(text) != text:
        # Whatever would steer the terminal is written out, and all else that is not ASCII with it.
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=1000)
    return text.rstrip("\n")


def _as_dict(message: Message) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)
