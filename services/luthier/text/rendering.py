"""Records to tokens and loss mask, and to the prompts of an evaluation: one renderer for training and for asking.

The tokens are always those of the whole rendered text, so that what trains is what a server would send. A loss mask
has one flag a token: True where the token is to be learnt. A token belongs to an assistant's turn when its first
character does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Any

from luthier.text.records import ChatRecord, CompletionRecord, Message, Record, message_to_object
from luthier.text.templates import ChatTemplate, TemplateError
from luthier.text.tokenizer import Encoding, TokenizerBundle

Span = tuple[int, int]
_SHOWN_CHARACTERS = 60


class MaskMode(StrEnum):
    """Which tokens are learnt."""

    ALL_ASSISTANT_TURNS = "ALL_ASSISTANT_TURNS"
    LAST_TURN = "LAST_TURN"
    MESSAGE_WEIGHT = "MESSAGE_WEIGHT"
    COMPLETION = "COMPLETION"


class LengthPolicy(StrEnum):
    """What happens to a record that is too long."""

    DROP = "DROP"
    TRUNCATE = "TRUNCATE"
    FAIL = "FAIL"


class RenderingError(ValueError):
    """A record that cannot be rendered under these settings; `reason` is a code a program can switch on."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TemplateNotPrefixPreserving(RenderingError):
    """The template writes earlier turns differently once a turn follows, so the assistant's text cannot be found."""

    def __init__(self, message: str) -> None:
        super().__init__("TEMPLATE_NOT_PREFIX_PRESERVING", message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Tokens of one record, and which of them are learnt."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that are learnt; the first never is, as nothing comes before it to predict it from."""
        return sum(self.loss_mask[1:])


class Renderer:
    """Renders records with one tokenizer, one template and one mask mode.

    Args:
        bundle: the model's tokenizer.
        template: Jinja source in place of the bundle's own template.
        today: the date that templates see.
        mask_mode: which tokens are learnt; None: assistant turns whose weight is not 0, and completions.
        prefix_ids: tokens before plain text in place of those that the tokenizer says.

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
    ) -> None:
        source = template or bundle.chat_template
        self._bundle = bundle
        self._template = ChatTemplate(source, today) if source else None
        self._mask_mode = mask_mode
        self.prefix_ids = _bos(bundle) if prefix_ids is None else prefix_ids

    def render(self, record: Record) -> Rendered:
        """Return the tokens of a record and its loss mask.

        A prompt-completion record is plain text: prompt, completion and the end-of-sequence token, which is learnt.

        Raises:
            RenderingError: the record does not suit the mask mode, the model has no chat template, or the template
                is not prefix-preserving.
            TemplateError: the template refuses the conversation.
        """
        if isinstance(record, CompletionRecord):
            return self._render_completion(record)
        text, spans = self._chat_spans(record)
        encoding = self._bundle.encode(text)
        return Rendered(input_ids=encoding.ids, loss_mask=_mask(encoding, self._learnt(record, spans)))

    def prompt(self, record: Record, shots: Sequence[Record] = ()) -> tuple[int, ...]:
        """Return the tokens that ask for a record's last answer, with `shots` as worked examples before it.

        The shots' own system turns are left out: the record's own stands first.

        Raises:
            RenderingError: kinds of record are mixed, or the model has no chat template.
            TemplateError: the template refuses the conversation.
        """
        if isinstance(record, CompletionRecord):
            return self._with_bos(self._bundle.encode(_completion_prompt(record, shots)).ids)
        asked = _with_shots(record, shots)
        return self.conversation([message_to_object(one) for one in asked.messages[:-1]], asked.tools)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return the tokens that ask for the next assistant turn of a conversation given as JSON values.

        Raises:
            RenderingError: the model has no chat template.
            TemplateError: the template refuses the conversation.
        """
        rendered = self._require_template().render(
            messages,
            tools=tools,
            add_generation_prompt=True,
            special_tokens=self._bundle.special_tokens,
        )
        return self._bundle.encode(rendered.text).ids

    def raw(self, text: str) -> tuple[int, ...]:
        """Return the tokens of plain text to continue, with those that stand before plain text."""
        return self._with_bos(self._bundle.encode(text).ids)

    def answer(self, record: Record, shots: Sequence[Record] = ()) -> Rendered:
        """Return the tokens of a record, its last answer alone learnt, with `shots` before it; raises as `prompt`."""
        if isinstance(record, CompletionRecord):
            prompt = _completion_prompt(record, shots)
            return self._render_completion(CompletionRecord(prompt=prompt, completion=record.completion))
        text, spans = self._chat_spans(_with_shots(record, shots))
        encoding = self._bundle.encode(text)
        return Rendered(input_ids=encoding.ids, loss_mask=_mask(encoding, spans[-1:]))

    def stop_token_ids(self) -> frozenset[int]:
        """Return the tokens that end an answer: end of sequence, and what ends an assistant's turn."""
        stops = {self._bundle.special_id("eos_token")}
        # The ending is looked for in a conversation made up for it, which a template may refuse though it takes others.
        with suppress(TemplateError, RenderingError):
            ending = self.turn_ending()
            stops.add(self._bundle.token_id(ending) if ending is not None else None)
        return frozenset(stop for stop in stops if stop is not None)

    @property
    def effective_template(self) -> str:
        """The template that renders, with the dates that it asks for written in; empty when there is none."""
        return "" if self._template is None else self._template.dated_source

    def turn_ending(self) -> str | None:
        """Return the special token that ends an assistant's turn, None when the template writes none."""
        if self._template is None:
            return None
        probe = ChatRecord(
            messages=(Message(role="user", content="a"), Message(role="assistant", content="b"))
        )
        text, spans = self._chat_spans(probe)
        return self._ending(text[slice(*spans[-1])])

    def warnings(self) -> tuple[str, ...]:
        """Return findings about the template and the tokenizer that do not stop a job."""
        if self._template is None and self._bundle.special_id("eos_token") is None:
            return (
                "no end-of-sequence token is learnt: the tokenizer names no eos_token, so the tuned model may not know "
                "when to stop",
            )
        if self._template is not None and self.turn_ending() is None:
            return (
                "no end-of-turn token is learnt: the template ends assistant turns without a special token, so the "
                "tuned model may not know when to stop",
            )
        return ()

    def _render_completion(self, record: CompletionRecord) -> Rendered:
        if self._mask_mode not in (None, MaskMode.COMPLETION):
            raise RenderingError(
                "INVALID_FIELD",
                f"mask mode {self._mask_mode} needs conversations; a prompt-completion record takes COMPLETION",
            )
        encoding = self._bundle.encode(record.prompt + record.completion)
        span = (len(record.prompt), len(record.prompt) + len(record.completion))
        ids, mask = self._with_bos(encoding.ids), _mask(encoding, (span,))
        mask = (False,) * (len(ids) - len(mask)) + mask
        eos = self._bundle.special_id("eos_token")
        if eos is None:
            return Rendered(input_ids=ids, loss_mask=mask)
        return Rendered(input_ids=(*ids, eos), loss_mask=(*mask, True))

    def _with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        # Once: a text may begin with them itself.
        return ids if ids[: len(self.prefix_ids)] == self.prefix_ids else (*self.prefix_ids, *ids)

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise RenderingError(
                "CHAT_TEMPLATE_MISSING",
                "the model has no chat template: pass one, or use prompt-completion records",
            )
        return self._template

    def _chat_spans(self, record: ChatRecord) -> tuple[str, tuple[Span, ...]]:
        """Return the text of a conversation and the span of each assistant turn, its end-of-turn token included."""
        template = self._require_template()
        if self._mask_mode is MaskMode.COMPLETION:
            raise RenderingError(
                "INVALID_FIELD", "mask mode COMPLETION needs prompt-completion records, got a conversation"
            )
        values = [message_to_object(message) for message in record.messages]
        whole = template.render(values, tools=record.tools, special_tokens=self._bundle.special_tokens)
        turns = [index for index, message in enumerate(record.messages) if message.role == "assistant"]
        if template.has_generation_blocks:
            if len(whole.generated) != len(turns):
                raise RenderingError(
                    "TEMPLATE_INVALID",
                    f"the template's generation blocks must mark every assistant turn: it marked "
                    f"{len(whole.generated)} of {len(turns)}",
                )
            return whole.text, tuple(self._trimmed(whole.text, span) for span in whole.generated)
        spans = (self._prefix_span(values, record.tools, whole.text, index) for index in turns)
        return whole.text, tuple(self._trimmed(whole.text, span) for span in spans)

    def _prefix_span(
        self, values: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], whole: str, index: int
    ) -> Span:
        """Find turn `index` as the difference between the text before it and the text up to it."""
        template = self._require_template()
        special_tokens = self._bundle.special_tokens
        before = template.render(
            values[:index], tools=tools, add_generation_prompt=True, special_tokens=special_tokens
        ).text
        upto = template.render(values[: index + 1], tools=tools, special_tokens=special_tokens).text
        for shorter, longer in ((before, upto), (upto, whole)):
            if not longer.startswith(shorter):
                raise TemplateNotPrefixPreserving(_difference(index, shorter, longer))
        return len(before), len(upto)

    def _trimmed(self, text: str, span: Span) -> Span:
        """Cut what follows the end-of-turn token: white space that belongs to the next turn."""
        start, end = span
        written = text[start:end]
        ending = self._ending(written)
        return (start, start + len(written.rstrip())) if ending is not None else span

    def _ending(self, turn: str) -> str | None:
        bare = turn.rstrip()
        endings = (token for token in self._bundle.special_texts if token and bare.endswith(token))
        return max(endings, key=len, default=None)

    def _learnt(self, record: ChatRecord, spans: Sequence[Span]) -> Sequence[Span]:
        if self._mask_mode is MaskMode.LAST_TURN:
            return spans[-1:]
        if self._mask_mode is MaskMode.ALL_ASSISTANT_TURNS:
            return spans
        assistants = (message for message in record.messages if message.role == "assistant")
        return [span for span, message in zip(spans, assistants, strict=True) if message.weight != 0]


def _bos(bundle: TokenizerBundle) -> tuple[int, ...]:
    bos = bundle.special_id("bos_token") if bundle.adds_bos else None
    return () if bos is None else (bos,)


def fit(rendered: Rendered, max_tokens: int, policy: LengthPolicy) -> Rendered | None:
    """Return a record within `max_tokens`: as it is, cut at the right, or None when it is dropped.

    Raises:
        RenderingError: SEQUENCE_TOO_LONG under the policy FAIL.
    """
    length = len(rendered.input_ids)
    if length <= max_tokens:
        return rendered
    if policy is LengthPolicy.DROP:
        return None
    if policy is LengthPolicy.FAIL:
        raise RenderingError("SEQUENCE_TOO_LONG", f"must have at most {max_tokens} tokens, got {length}")
    return Rendered(
        input_ids=rendered.input_ids[:max_tokens], loss_mask=rendered.loss_mask[:max_tokens], truncated=True
    )


def reference_text(record: Record) -> str:
    """Return the answer that is right: the last assistant turn, or the completion."""
    return record.completion if isinstance(record, CompletionRecord) else record.messages[-1].content


def _mask(encoding: Encoding, spans: Sequence[Span]) -> tuple[bool, ...]:
    mask = [False] * len(encoding.ids)
    for start, end in spans:
        for index, (first, _) in enumerate(encoding.offsets):
            if start <= first < end:
                mask[index] = True
    return tuple(mask)


def _with_shots(record: ChatRecord, shots: Sequence[Record]) -> ChatRecord:
    systems = tuple(message for message in record.messages if message.role in ("system", "developer"))
    turns: list[Message] = []
    for shot in shots:
        if not isinstance(shot, ChatRecord):
            raise RenderingError("INVALID_FIELD", "examples before a conversation must be conversations")
        turns += [message for message in shot.messages if message.role not in ("system", "developer")]
    own = record.messages[len(systems) :]
    return ChatRecord(messages=(*systems, *turns, *own), tools=record.tools)


def _completion_prompt(record: CompletionRecord, shots: Sequence[Record]) -> str:
    parts: list[str] = []
    for shot in shots:
        if not isinstance(shot, CompletionRecord):
            raise RenderingError(
                "INVALID_FIELD", "examples before a prompt must be prompt-completion records"
            )
        parts.append(f"{shot.prompt}{shot.completion}\n\n")
    return "".join(parts) + record.prompt


def _difference(index: int, shorter: str, longer: str) -> str:
    place = next(
        (at for at, (left, right) in enumerate(zip(shorter, longer, strict=False)) if left != right),
        min(len(shorter), len(longer)),
    )
    return (
        f"the chat template is not prefix-preserving: at message {index} the text "
        f"{shorter[place : place + _SHOWN_CHARACTERS]!r} becomes {longer[place : place + _SHOWN_CHARACTERS]!r} once "
        "more turns follow; pass a chat_template whose assistant turns stand in {% generation %} blocks"
    )


__all__ = [
    "LengthPolicy",
    "MaskMode",
    "Rendered",
    "Renderer",
    "RenderingError",
    "TemplateError",
    "TemplateNotPrefixPreserving",
    "fit",
    "reference_text",
]
