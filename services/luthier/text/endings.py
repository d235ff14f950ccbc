"""How a template ends an assistant's turn, found in conversations that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.text.spans import AskedTexts, RenderingError, Writer
from luthier.text.templates import TemplateError
from luthier.text.turns import template_turns

Conversation = Sequence[Mapping[str, Any]]
_USER, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_PROBES: Sequence[Conversation] = ((_USER,), ({"role": "system", "content": "c"}, _USER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """Tokens that end an answer.

    Attributes:
        token_ids: the tokens.
        unknown: why it is not known how the template ends a turn, which may be by another token; empty when it is.
        end_turns: whether some of them are how the template ends a turn.
    """

    token_ids: frozenset[int]
    unknown: str = ""
    end_turns: bool = False


def turn_endings(
    writer: Writer, asked: Conversation, tools: Sequence[Mapping[str, Any]]
) -> tuple[frozenset[str], str]:
    """Return the special tokens that end an answer in conversations that the template takes.

    They are a few made up for it and the one that is `asked`, of the turns before the answer, empty for none. Where the
    template refuses them all the second is what it says to the last.
    """
    found: set[str] = set()
    refused = ""
    is_known = False
    for turns, given in (*((probe, ()) for probe in _PROBES), *([(asked, tools)] if asked else [])):
        try:
            written = writer.write(template_turns([*turns, _ANSWER]), given, [len(turns)], AskedTexts())
        except (TemplateError, RenderingError) as error:
            refused = str(error)
            continue
        is_known = True
        ending = writer.ending(written.text[slice(*written.spans[len(turns)])])
        found |= set() if ending is None else {ending}
    return frozenset(found), "" if is_known else refused
