"""Records to tokens and loss mask, and to the prompts of an evaluation: one renderer for training and for asking.

The tokens before an answer are those that ask for it: the text is encoded up to where the answer begins, and then on
from there (`boundaries`). A loss mask has one flag a token: True where the token is to be learnt. A token belongs to
an answer when its first character does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from functools import partial
from typing import Any

from luthier.text.boundaries import ApartEncoding, BoundaryEncoder
from luthier.text.endings import Stops, turn_endings
from luthier.text.findings import Finding, FindingKind
from luthier.text.omissions import left_out
from luthier.text.records import ChatRecord, CompletionRecord, Message, SingleRecord, message_to_object
from luthier.text.shots import prompt_with_shots, with_shots
from luthier.text.spans import AskedTexts, Between, RenderingError, Span, Values, Writer, Written
from luthier.text.templates import ChatTemplate, TemplateError
from luthier.text.tokenizer import TokenizerBundle
from luthier.text.turns import template_turns, text_arguments

_SHOWN_CHARACTERS = 20


class MaskMode(StrEnum):
    """Which tokens are learnt."""

    ALL_ASSISTANT_TURNS = "ALL_ASSISTANT_TURNS"
    LAST_TURN = "LAST_TURN"
    MESSAGE_WEIGHT = "MESSAGE_WEIGHT"
    COMPLETION = "COMPLETION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Tokens of one record, and which of them are learnt.

    Attributes:
        input_ids: the tokens.
        loss_mask: whether each is to be learnt.
        truncated: whether it was cut.
        findings: what its maker should know of it.
        ending_ids: tokens that end its answers.
        num_asking: tokens before the first answer that is learnt, those that ask for it; 0 when none is.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    truncated: bool = False
    findings: tuple[Finding, ...] = ()
    ending_ids: tuple[int, ...] = ()
    num_asking: int = 0

    @property
    def num_supervised(self) -> int:
        """Tokens that are learnt; the first never is, as nothing comes before it to predict it from."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A conversation as tokens, with the turns that its template was given and the text that it wrote.

    `asks`: whether it ends with what asks for an answer.
    """

    rendered: Rendered
    turns: Sequence[Mapping[str, Any]]
    text: str
    asks: bool = False


class Renderer:
    """Renders records with one tokenizer, one template and one mask mode.

    Args:
        bundle: the model's tokenizer.
        template: Jinja source in place of the bundle's own template.
        today: the date that templates see.
        mask_mode: which tokens are learnt; None: assistant turns whose weight is not 0, and completions.
        prefix_ids: tokens before plain text in place of those that the tokenizer says.
        between: called between the parts of a row, each of which asking for it takes, or none.

    Raises:
        TemplateError: the template does not compile.
    """

    def __init__(
        self,
        bundle: TokenizerBundle,
        *,
        today: date,
        template: str | None = None,
        mask_mode: MaskMode | None = None,
        prefix_ids: tuple[int, ...] | None = None,
        between: Between = lambda _: None,
    ) -> None:
        source = template or bundle.chat_template
        self._bundle = bundle
        self._encoder = BoundaryEncoder(bundle)
        self._writer = (
            Writer(ChatTemplate(source, today), bundle.special_tokens, bundle.special_texts, between)
            if source
            else None
        )
        self._mask_mode = mask_mode
        self._between = between
        self.prefix_ids = bundle.prefix_ids if prefix_ids is None else prefix_ids

    def render(self, record: SingleRecord) -> Rendered:
        """Return the tokens of a record and its loss mask.

        A prompt-completion record is plain text: prompt, completion and the end-of-sequence token, which is learnt.

        Raises:
            RenderingError: the record does not suit the mask mode, the model has no chat template, or the template
                is not prefix-preserving.
            TemplateError: the template refuses the conversation.
        """
        if isinstance(record, CompletionRecord):
            return self._render_completion(record)
        row = self._render_chat(record, self._learnt(record), AskedTexts())
        return replace(row.rendered, findings=(*row.rendered.findings, *self._omissions(record, [row])))

    def render_turns(self, record: SingleRecord) -> tuple[Rendered, ...]:
        """Return one row for each answer that is learnt, as the model will see it when it is asked for.

        A row ends with its answer, which alone is learnt. A prompt-completion record is one row; a conversation
        whose answers all have weight 0 gives none. Raises as `render`.
        """
        if isinstance(record, CompletionRecord):
            return (self._render_completion(record),)
        asked = AskedTexts()
        rows = [
            self._render_chat(replace(record, messages=record.messages[: index + 1]), [index], asked)
            for index in self._learnt(record)
        ]
        omissions = tuple(self._omissions(record, rows))
        return tuple(
            replace(row.rendered, findings=(*row.rendered.findings, *(omissions if row is rows[0] else ())))
            for row in rows
        )

    def continued(self, record: SingleRecord, first: int, asked: AskedTexts) -> Rendered:
        """Return the tokens of a record, its answer learnt: the completion, or the assistant turns from `first` on.

        Turns of weight 0 are not learnt. `asked` is filled. Raises as `render`.
        """
        if isinstance(record, CompletionRecord):
            return self._render_completion(record)
        learnt = [index for index in self._learnt(record) if index >= first]
        row = self._render_chat(record, learnt, asked)
        return replace(row.rendered, findings=(*row.rendered.findings, *self._omissions(record, [row])))

    def asking(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Rendered:
        """Return the tokens that ask for an answer to some turns, and what they do not show; raises as `prompt`."""
        given = [message_to_object(message) for message in messages]
        turns = template_turns(given)
        written = self._require_writer().ask(turns, tools)
        ids = self._encoder.encode(written.text, written.cuts).encoding.ids
        self._between(0.0)
        rendered = Rendered(input_ids=ids, loss_mask=(False,) * len(ids), num_asking=len(ids))
        row = _Row(rendered=rendered, turns=turns, text=written.text, asks=True)
        record = ChatRecord(messages=tuple(messages), tools=tuple(tools))
        return replace(rendered, findings=(*_arguments(given), *self._omissions(record, [row])))

    def prompt(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> tuple[int, ...]:
        """Return the tokens that ask for a record's last answer, with `shots` as worked examples before it.

        The shots' own system turns are left out: the record's own stands first.

        Raises:
            RenderingError: kinds of record are mixed, or the model has no chat template.
            TemplateError: the template refuses the conversation.
        """
        if isinstance(record, CompletionRecord):
            return self._with_bos(self._bundle.encode(prompt_with_shots(record, shots)).ids)
        asked = with_shots(record, shots)
        return self.conversation([message_to_object(one) for one in asked.messages[:-1]], asked.tools)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return the tokens that ask for the next assistant turn of a conversation given as JSON values.

        Raises:
            RenderingError: the model has no chat template.
            TemplateError: the template refuses the conversation.
        """
        written = self._require_writer().ask(template_turns(messages), tools)
        return self._encoder.encode(written.text, written.cuts).encoding.ids

    def raw(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a plain text that is to be continued: as a plain record's prompt, without a template."""
        return self._with_bos(self._bundle.encode(text).ids)

    def answer(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> Rendered:
        """Return the tokens of a record, its last answer alone learnt, with `shots` before it; raises as `prompt`."""
        if isinstance(record, CompletionRecord):
            prompt = prompt_with_shots(record, shots)
            return self._render_completion(CompletionRecord(prompt=prompt, completion=record.completion))
        asked = with_shots(record, shots)
        return self._render_chat(asked, [len(asked.messages) - 1], AskedTexts()).rendered

    def stops(
        self, messages: Sequence[Mapping[str, Any]] = (), tools: Sequence[Mapping[str, Any]] = ()
    ) -> Stops:
        """Return the tokens that end an answer: end of sequence, and what ends an assistant's turn.

        `messages` are the turns before an answer that the template takes, for one that refuses those made up for it.
        """
        texts, unknown = (
            (frozenset[str](), "") if self._writer is None else turn_endings(self._writer, messages, tools)
        )
        ids = {self._bundle.special_id("eos_token"), *map(self._bundle.token_id, texts)}
        found = frozenset(one for one in ids if one is not None)
        return Stops(token_ids=found, unknown=unknown, end_turns=bool(texts))

    @property
    def effective_template(self) -> str:
        """The template that renders, with the dates that it asks for written in; empty when there is none."""
        return "" if self._writer is None else self._writer.dated_source

    def _render_completion(self, record: CompletionRecord) -> Rendered:
        if self._mask_mode not in (None, MaskMode.COMPLETION):
            raise RenderingError(
                "INVALID_FIELD",
                f"mask mode {self._mask_mode} needs conversations, got a prompt-completion record",
                "leave --mask (mask_mode) out or pass completion (COMPLETION)",
            )
        text, cut = record.prompt + record.completion, len(record.prompt)
        apart = self._encoder.encode(text, [cut])
        self._between(0.0)
        findings = list(_boundary(apart, cut, text, "the completion"))
        completion = apart.encoding.ids[apart.counts[0] :]
        if self._encoder.says_nothing(completion):
            findings.append(Finding(kind=FindingKind.ONLY_END_LEARNT, message="the completion"))
        ids = self._with_bos(apart.encoding.ids)
        num_asking = len(ids) - len(completion)
        mask = (*((False,) * num_asking), *((True,) * len(completion)))
        eos = self._bundle.special_id("eos_token")
        if eos is None:
            message = "the completion: the tokenizer names no eos_token"
            findings.append(Finding(kind=FindingKind.END_NOT_LEARNT, message=message))
        elif ids[-1:] != (eos,):
            ids, mask = (*ids, eos), (*mask, True)
        return Rendered(
            input_ids=ids,
            loss_mask=mask,
            findings=tuple(findings),
            ending_ids=() if eos is None else (eos,),
            num_asking=num_asking,
        )

    def _with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        # Once: a text may begin with them itself.
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else (*self.prefix_ids, *ids)

    def _require_writer(self) -> Writer:
        if self._writer is None:
            raise RenderingError(
                "CHAT_TEMPLATE_MISSING",
                "the model has no chat template",
                "pass one by --chat-template FILE (chat_template), or use prompt-completion records",
            )
        return self._writer

    def _render_chat(self, record: ChatRecord, learnt: Sequence[int], asked: AskedTexts) -> _Row:
        """Return the row of a conversation with these turns learnt; `asked` is filled."""
        writer = self._require_writer()
        if self._mask_mode is MaskMode.COMPLETION:
            raise RenderingError(
                "INVALID_FIELD",
                "mask mode COMPLETION needs prompt-completion records, got a conversation",
                "leave --mask (mask_mode) out or pass one for conversations",
            )
        given = [message_to_object(message) for message in record.messages]
        turns = template_turns(given)
        written = writer.write(turns, record.tools, learnt, asked)
        apart = self._encoder.encode(written.text, written.cuts)
        self._between(0.0)
        findings = [*_arguments(given)]
        findings += (
            Finding(kind=FindingKind.ASKED_DIFFERENTLY, message=f"message {index}")
            for index in written.asked_differently
        )
        mask = [False] * len(apart.encoding.ids)
        for index, span in written.spans.items():
            findings += self._learn(mask, apart, written, (index, span))
        endings = {index: writer.ending(written.text[slice(*span)]) for index, span in written.spans.items()}
        findings += (
            Finding(
                kind=FindingKind.END_NOT_LEARNT,
                message=f"message {index}: the chat template ends it without a special token",
            )
            for index, ending in endings.items()
            if ending is None
        )
        ids = (self._bundle.token_id(ending) for ending in endings.values() if ending is not None)
        rendered = Rendered(
            input_ids=apart.encoding.ids,
            loss_mask=tuple(mask),
            findings=tuple(findings),
            ending_ids=tuple(sorted({one for one in ids if one is not None})),
            num_asking=apart.counts[written.cuts.index(written.asked_at[min(learnt)])] if learnt else 0,
        )
        return _Row(rendered=rendered, turns=turns, text=written.text)

    def _omissions(self, record: ChatRecord, rows: Sequence[_Row]) -> Iterator[Finding]:
        """Yield what no row of a record shows: templates leave out of earlier turns what they ask without."""
        omitted: dict[int, str] = {}
        shown: set[int] = set()
        for row in rows:
            render = partial(self._text, tools=record.tools, asks=row.asks)
            missing = left_out(row.turns, row.text, render)
            self._between(0.0)
            omitted.update(missing)
            shown |= set(range(len(row.turns))) - set(missing)
        for index, what in sorted(omitted.items()):
            if index not in shown:
                message = f"message {index} ({record.messages[index].role}): {what} is missing"
                yield Finding(kind=FindingKind.TURN_NOT_WRITTEN, message=message)
        if record.tools and rows and self._leaves_out_tools(rows[-1]):
            yield Finding(kind=FindingKind.TURN_NOT_WRITTEN, message="tools: none of them is written")

    def _leaves_out_tools(self, row: _Row) -> bool:
        try:
            return self._text(row.turns, (), asks=row.asks) == row.text
        except TemplateError:
            return False  # it needs them, so it does not leave them out

    def _text(self, messages: Values, tools: Values, *, asks: bool = False) -> str:
        return self._require_writer().text(template_turns(messages), tools, asks=asks)

    def _learn(
        self, mask: list[bool], apart: ApartEncoding, written: Written, turn: tuple[int, Span]
    ) -> Iterator[Finding]:
        """Mark the tokens of a turn in the mask, and yield what is found."""
        index, (start, end) = turn
        # A block may begin elsewhere than where the model is asked; a token that it shares is learnt.
        learnt = [
            position
            for position, (first, last) in enumerate(apart.encoding.offsets)
            if start <= first < end or first < start < last
        ]
        for position in learnt:
            mask[position] = True
        if learnt and apart.encoding.offsets[learnt[0]][0] < start:
            yield Finding(
                kind=FindingKind.JOINED_BOUNDARY,
                message=f"message {index}: a token that begins before its block is learnt with it",
            )
        yield from _boundary(apart, start, written.text, f"message {index}")
        if self._encoder.says_nothing([apart.encoding.ids[position] for position in learnt]):
            yield Finding(kind=FindingKind.ONLY_END_LEARNT, message=f"message {index}")

    def _learnt(self, record: ChatRecord) -> list[int]:
        """Return the messages that are learnt."""
        turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
        if self._mask_mode is MaskMode.LAST_TURN:
            return turns[-1:]
        if self._mask_mode is MaskMode.ALL_ASSISTANT_TURNS:
            return turns
        return [index for index in turns if record.messages[index].weight != 0]


def reference_text(record: SingleRecord) -> str:
    """Return the answer that is right: the last assistant turn, or the completion."""
    return record.completion if isinstance(record, CompletionRecord) else record.messages[-1].content


def _arguments(messages: Values) -> Iterator[Finding]:
    for index, text in text_arguments(messages):
        message = f"message {index}: the arguments are {text!r}"
        yield Finding(kind=FindingKind.ARGUMENTS_NOT_OBJECT, message=message)


def _boundary(apart: ApartEncoding, cut: int, text: str, place: str) -> Iterator[Finding]:
    if cut not in apart.joined:
        return
    kind = FindingKind.INEXACT_BOUNDARY if cut in apart.inexact else FindingKind.JOINED_BOUNDARY
    before, after = text[max(cut - _SHOWN_CHARACTERS, 0) : cut], text[cut : cut + _SHOWN_CHARACTERS]
    yield Finding(kind=kind, message=f"{place}: between {before!r} and {after!r}")


__all__ = ["Finding", "FindingKind", "MaskMode", "Rendered", "Renderer", "RenderingError", "reference_text"]
