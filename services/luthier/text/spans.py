"""The text of a conversation, where in it each answer is asked for, and what of it an assistant says.

A template that marks assistant turns by `generation` blocks says itself what they say. For others a turn is the
difference between the text that asks for it and the text up to it; both must stand unchanged in the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import process_time
from typing import Any, Self

from luthier.text.templates import ChatTemplate, RenderedText, TemplateError

Span = tuple[int, int]
Values = Sequence[Mapping[str, Any]]
"""Turns or tools as JSON values."""
_SHOWN_CHARACTERS = 60


class RenderingError(ValueError):
    """A record that cannot be rendered under these settings.

    Attributes:
        reason: a code that a program can switch on.
        hint: what the one who made the settings can do about it, as a clause; empty when nothing.
    """

    def __init__(self, reason: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint


class TemplateNotPrefixPreserving(RenderingError):
    """The template writes earlier turns differently once a turn follows, so the assistant's text cannot be found."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__("TEMPLATE_NOT_PREFIX_PRESERVING", message, hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A conversation's text.

    `asked_at` are the places up to which the text asks for answers, `spans` the answers, end-of-turn token included,
    both by message index. `asked_differently` are those that stand behind other text than asks for them.
    """

    text: str
    asked_at: Mapping[int, int] = field(default_factory=dict)
    spans: Mapping[int, Span] = field(default_factory=dict)
    asked_differently: tuple[int, ...] = ()

    @property
    def cuts(self) -> tuple[int, ...]:
        """The places up to which the text asks for an answer, rising."""
        return tuple(sorted(set(self.asked_at.values())))


Between = Callable[[float], None]
"""Called between what one prompt takes and what the next does, or what none does: whole texts of a record.

It is given the CPU seconds that were spent before on what asking takes by what follows.
"""


@dataclass(slots=True, kw_only=True)
class AskedTexts:
    """The texts that ask for turns of one conversation, as far as they are known; its beginnings may share them.

    Attributes:
        texts: by message index; None where the template refuses to ask.
        seconds: the CPU time that it took to write each.
    """

    texts: dict[int, str | None] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def cpu_seconds(self) -> float:
        """What it took to write them all: who asks for the last turn asks for those before it, too."""
        return sum(self.seconds.values())

    def upto(self, index: int) -> Self:
        """Return those of the beginning that ends by asking for a turn."""
        places = [place for place in self.texts if place <= index]
        return replace(
            self,
            texts={place: self.texts[place] for place in places},
            seconds={place: self.seconds[place] for place in places},
        )


class Writer:
    """Writes conversations by one template.

    Args:
        template: the template.
        special_tokens: texts that templates use by name.
        endings: tokens that may end a turn.
        between: called between the texts of a conversation that is written.
    """

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Mapping[str, str],
        endings: Sequence[str],
        between: Between = lambda _: None,
    ) -> None:
        self._template = template
        self._between = between
        self._special_tokens = special_tokens
        self._endings = endings

    @property
    def dated_source(self) -> str:
        """The template's source with the dates that it asks for written in."""
        return self._template.dated_source

    def ask(self, messages: Values, tools: Values) -> Written:
        """Return the text that asks for the next turn.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        rendered = self._render(messages, tools, asks=True)
        return Written(text=rendered.text, asked_at=self._asked_in_history(messages, tools, rendered))

    def text(self, messages: Values, tools: Values, *, asks: bool = False) -> str:
        """Return the text of a whole conversation, or what asks to go on with it. Raises TemplateError."""
        return self._render(messages, tools, asks=asks).text

    def write(self, messages: Values, tools: Values, learnt: Collection[int], asked: AskedTexts) -> Written:
        """Return the text of a whole conversation, and the spans of the assistant turns `learnt`.

        `asked` is filled. What follows is encoding the text, which asking takes behind the texts that ask.

        Raises:
            RenderingError: the template's blocks do not mark every turn, or TEMPLATE_NOT_PREFIX_PRESERVING.
            TemplateError: the template refuses the conversation.
        """
        whole = self._render(messages, tools)
        self._between(asked.cpu_seconds)
        turns = _assistants(messages)
        for index in turns:
            needed = index in learnt and not self._template.has_generation_blocks
            if index not in asked.texts or (needed and asked.texts[index] is None):
                started = process_time()
                asked.texts[index] = self._asking(messages, tools, index, needed=needed)
                asked.seconds[index] = process_time() - started
        asking = {index: asked.texts[index] for index in turns}
        if self._template.has_generation_blocks:
            return self._marked(whole, turns, asking, learnt)
        spans = {}
        for index in turns:
            if index in learnt:
                self._between(0.0)
                spans[index] = self._difference(messages, tools, index, (asking[index] or "", whole.text))
        self._between(asked.cpu_seconds)
        return Written(text=whole.text, asked_at=_asked_at(whole.text, asking, {}), spans=spans)

    def ending(self, turn: str) -> str | None:
        """Return the special token that ends a turn's text, None when there is none."""
        bare = turn.rstrip()
        endings = (token for token in self._endings if token and bare.endswith(token))
        return max(endings, key=len, default=None)

    def _marked(
        self,
        whole: RenderedText,
        turns: Sequence[int],
        asking: Mapping[int, str | None],
        learnt: Collection[int],
    ) -> Written:
        if len(whole.generated) != len(turns):
            raise RenderingError(
                "TEMPLATE_INVALID",
                f"the template's generation blocks must mark every assistant turn: it marked "
                f"{len(whole.generated)} of {len(turns)}",
            )
        marked = dict(zip(turns, whole.generated, strict=True))
        spans = {index: self._trimmed(whole.text, span) for index, span in marked.items() if index in learnt}
        differently = tuple(index for index in spans if not whole.text.startswith(asking[index] or "\0"))
        return Written(
            text=whole.text,
            asked_at=_asked_at(whole.text, asking, marked),
            spans=spans,
            asked_differently=differently,
        )

    def _asked_in_history(self, messages: Values, tools: Values, rendered: RenderedText) -> dict[int, int]:
        turns = _assistants(messages)
        asking = {index: self._asking(messages, tools, index) for index in turns}
        found = len(rendered.generated) == len(turns)
        marked = dict(zip(turns, rendered.generated, strict=True)) if found else {}
        return _asked_at(rendered.text, asking, marked)

    def _asking(self, messages: Values, tools: Values, index: int, *, needed: bool = False) -> str | None:
        """Return the text that asks for turn `index`; None when the template refuses it and it is not needed."""
        try:
            return self._render(messages[:index], tools, asks=True).text
        except TemplateError:
            if needed:
                raise
            return None

    def _difference(self, messages: Values, tools: Values, index: int, texts: tuple[str, str]) -> Span:
        """Find turn `index` between the text that asks for it and the text up to it, in the whole text."""
        before, whole = texts
        upto = whole if index == len(messages) - 1 else self._render(messages[: index + 1], tools).text
        if not upto.startswith(before):
            raise TemplateNotPrefixPreserving(
                _changed(index, before, upto, "the answer follows"), f"pass {_BLOCKS_HINT}"
            )
        if not whole.startswith(upto):
            raise TemplateNotPrefixPreserving(_changed(index, upto, whole, "more turns follow"), _HINT)
        return self._trimmed(whole, (len(before), len(upto)))

    def _trimmed(self, text: str, span: Span) -> Span:
        """Cut what follows the end-of-turn token: white space that belongs to the next turn."""
        start, end = span
        written = text[start:end]
        return (start, start + len(written.rstrip())) if self.ending(written) is not None else span

    def _render(self, messages: Values, tools: Values, *, asks: bool = False) -> RenderedText:
        return self._template.render(
            messages, tools=tools, add_generation_prompt=asks, special_tokens=self._special_tokens
        )


_BLOCKS_HINT = (
    "--chat-template FILE (chat_template) with a template whose assistant turns stand in {% generation %} "
    "blocks"
)
_HINT = f"pass --split-turns (split_turns), --mask last-turn (mask_mode LAST_TURN), or {_BLOCKS_HINT}"


def _assistants(messages: Values) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


def _asked_at(text: str, asking: Mapping[int, str | None], marked: Mapping[int, Span]) -> dict[int, int]:
    """Return where answers are asked for in a text; where other text asks for one, where its block begins."""
    places: dict[int, int] = {}
    for index, asks in asking.items():
        if asks is not None and text.startswith(asks):
            places[index] = len(asks)
        elif index in marked:
            places[index] = marked[index][0]
    return places


def _changed(index: int, shorter: str, longer: str, follows: str) -> str:
    place = next(
        (at for at, (left, right) in enumerate(zip(shorter, longer, strict=False)) if left != right),
        min(len(shorter), len(longer)),
    )
    return (
        f"the chat template is not prefix-preserving: at message {index} the text "
        f"{shorter[place : place + _SHOWN_CHARACTERS]!r} becomes {longer[place : place + _SHOWN_CHARACTERS]!r} "
        f"once {follows}"
    )


__all__ = [
    "AskedTexts",
    "Between",
    "RenderingError",
    "Span",
    "TemplateNotPrefixPreserving",
    "Values",
    "Writer",
    "Written",
]
