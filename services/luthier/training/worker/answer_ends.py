"""How rows end that a reward model was taught by: what stands behind the text of an answer, as tokens.

A template may write more behind the token that ends an answer than a model does that is asked: a line feed, an end of
text. The value of a row is that of its last token, so that an answer gets the same end before it is valued.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord, record_to_json
from luthier.v1.model_pb2 import Taught
from luthier.work.text_pool import TextRefused

AskText = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Asks a limited process, which has the tokenizer, for what `luthier.work.text_child` does; raises TextRefused."""

_USER, _ANSWER = Message(role="user", content="a"), Message(role="assistant", content="b")
_CONVERSATIONS = (
    ChatRecord(messages=(_USER, _ANSWER)),
    ChatRecord(messages=(Message(role="system", content="c"), _USER, _ANSWER)),
)
_TEXTS = (CompletionRecord(prompt="a", completion="b"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEnd:
    """The tokens that a row has behind the text of an answer.

    Attributes:
        token_ids: the tokens, from the one that ends the answer to the end of the row.
        unknown: why there are none; empty when there are.
    """

    token_ids: tuple[int, ...] = ()
    unknown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEnds:
    """How rows of conversations end, and those of plain text."""

    conversation: AnswerEnd
    text: AnswerEnd

    @property
    def most_tokens(self) -> int:
        """Tokens of the longer end."""
        return max(len(self.conversation.token_ids), len(self.text.token_ids))

    def of(self, record_json: str) -> AnswerEnd:
        """Return how the row of a record ends, which is given as canonical JSON."""
        return self.conversation if "messages" in json.loads(record_json) else self.text


def answer_ends(ask: AskText, taught: Taught, stop_token_ids: frozenset[int]) -> AnswerEnds:
    """Return how rows end that a reward model was taught by, found in rows made up for it.

    `stop_token_ids` are the tokens that end an answer where it is drawn; those that the reward model was taught count
    too. Raises LuthierError where no process can be asked.
    """
    stops = stop_token_ids | frozenset(taught.stop_token_ids)
    text = _found(ask, taught, stops, _TEXTS)
    # Without a template it was taught plain text alone.
    conversation = _found(ask, taught, stops, _CONVERSATIONS) if taught.chat_template else text
    return AnswerEnds(conversation=conversation, text=text)


def _found(ask: AskText, taught: Taught, stops: frozenset[int], probes: Sequence[SingleRecord]) -> AnswerEnd:
    asked = {
        "chat_template": taught.chat_template,
        "template_date": taught.template_date or datetime.now(UTC).date().isoformat(),
        "prefix_token_ids": list(taught.prefix_token_ids),
    }
    refused = ""
    for probe in probes:
        request = {"do": "answer", "record": record_to_json(probe), "shots": [], "asked": asked}
        try:
            answer = ask(request)
        except TextRefused as error:
            refused = error.message
            continue
        ids = answer["ids"][answer["num_asking"] :]
        first = next((place for place, one in enumerate(ids) if one in stops), None)
        if first is None:
            return AnswerEnd(unknown="no token ends an answer in its rows")
        return AnswerEnd(token_ids=tuple(ids[first:]))
    return AnswerEnd(unknown=f"its template refuses an answer made up to see that: {refused}")
