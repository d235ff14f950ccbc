"""Judges of an evaluation from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.cli.drafts import field_option, message_of

if TYPE_CHECKING:
    from luthier.v1.judge_pb2 import Judge

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeFile:
    """A file that was typed; its text is the judge in it, as it stands in a message."""

    word: str
    judge: Judge

    def __str__(self) -> str:
        from google.protobuf.json_format import MessageToJson

        return MessageToJson(self.judge, preserving_proto_field_name=True)


def _judges(context: click.Context, option: click.Parameter, paths: Sequence[str]) -> tuple[JudgeFile, ...]:
    from luthier.v1.judge_pb2 import Judge

    del context, option
    return tuple(JudgeFile(word=path, judge=message_of(path, Judge)) for path in paths)


judge_option: Callable[[F], F] = field_option(
    "--judge",
    field="judges",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    callback=_judges,
    metavar="FILE",
    help="A language model that judges the answers, in YAML or JSON; gives the score judge.ID.  [repeatable]",
)
"""The option --judge."""
