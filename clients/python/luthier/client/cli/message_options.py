"""Judges and graders of an evaluation from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.cli.drafts import field_option, message_of

if TYPE_CHECKING:
    from google.protobuf.message import Message

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageFile:
    """A file that was typed; its text is the message in it, as it stands in another."""

    word: str
    message: Message

    def __str__(self) -> str:
        from google.protobuf.json_format import MessageToJson

        return MessageToJson(self.message, preserving_proto_field_name=True)


def _judge() -> type[Message]:
    from luthier.v1.judge_pb2 import Judge

    return Judge


def _grader() -> type[Message]:
    from luthier.v1.grader_pb2 import Grader

    return Grader


def _files_option(name: str, field: str, kind: Callable[[], type[Message]], text: str) -> Callable[[F], F]:
    def read(
        context: click.Context, option: click.Parameter, paths: Sequence[str]
    ) -> tuple[MessageFile, ...]:
        del context, option
        return tuple(MessageFile(word=path, message=message_of(path, kind())) for path in paths)

    return field_option(
        name,
        field=field,
        multiple=True,
        type=click.Path(exists=True, dir_okay=False),
        callback=read,
        metavar="FILE",
        help=f"{text}  [repeatable]",
    )


judge_option: Callable[[F], F] = _files_option(
    "--judge",
    "judges",
    _judge,
    "A language model that judges the answers, in YAML or JSON; gives the score judge.ID.",
)
"""The option --judge."""
grader_option: Callable[[F], F] = _files_option(
    "--grader",
    "graders",
    _grader,
    "A grader of the answers that has a name, in YAML or JSON; gives the score grader.NAME.",
)
"""The option --grader."""
