"""Prompts and text of one model, made in limited processes the way the model is to be asked."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.text.endings import Stops
from luthier.text.instructions import instructed
from luthier.text.records import ChatRecord, SingleRecord, message_to_object, record_to_json
from luthier.text.rendering import Rendered, RenderingError
from luthier.text.templates import TemplateError
from luthier.v1 import evaluation_pb2
from luthier.work.limited import Check
from luthier.work.text_pool import OLD_PREFIX, Bundle, TextPool, TextRefused
from luthier.worker.v1 import task_pb2

_KEPT_TEXTS = 4096
MAX_AT_LIMIT = 3
"""Times in a row that a template may take more than a limit allows before it is not run again."""


class Prompts(Protocol):
    """What a renderer does of asking; `luthier.text.rendering.Renderer` is one."""

    def prompt(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> tuple[int, ...]:
        """Return the tokens that ask for a record's last answer."""
        ...

    def answer(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> Rendered:
        """Return the tokens of a record, its last answer alone learnt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a model is asked.

    Attributes:
        chat_template: Jinja source; empty: the base model's own.
        template_date: what templates see as today, YYYY-MM-DD.
        prefix_token_ids: tokens before plain text; None: those that the tokenizer says; OLD_PREFIX: those of renderings
            made before they kept theirs.
        stop_token_ids: tokens that end an answer besides those that template and tokenizer say.
        system_prompt: in place of the system turns that records begin with; empty: these.
    """

    chat_template: str
    template_date: str
    prefix_token_ids: tuple[int, ...] | str | None
    stop_token_ids: tuple[int, ...]
    system_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What stands before an answer: turns and tools as JSON values."""

    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def answer_of(record: SingleRecord) -> Before:
        """Return what stands before a record's last answer; nothing for plain text, which has no turns."""
        if not isinstance(record, ChatRecord):
            return Before()
        return Before(
            messages=[message_to_object(message) for message in record.messages[:-1]], tools=record.tools
        )


def asking_of(message: task_pb2.Asking, file_eos_token_ids: frozenset[int] = frozenset()) -> Asking:
    """Read how a model is to be asked; what is not set is the base model's own, and today.

    `file_eos_token_ids` are what the files of a base model say that was registered before its resource said it.
    """
    prefix: tuple[int, ...] | str | None = None
    if message.HasField("prefix"):
        prefix = tuple(message.prefix.token_ids)
    elif message.old_prefix or message.template_source == evaluation_pb2.TEMPLATE_SOURCE_TAUGHT:
        prefix = OLD_PREFIX
    return Asking(
        chat_template=message.chat_template,
        template_date=message.template_date or datetime.now(UTC).date().isoformat(),
        prefix_token_ids=prefix,
        stop_token_ids=(*message.stop_token_ids, *(message.eos_token_ids or sorted(file_eos_token_ids))),
        system_prompt=message.system_prompt,
    )


class Asker:
    """Asks one model in one way. Every method may take as long as the pool's limits allow.

    Raises, from every method that makes tokens: RenderingError and TemplateError as `Renderer` does, and where
    template or tokenizer take more than a limit allows; LuthierError when the processes are overloaded or shut down, or
    `check` raised. After `MAX_AT_LIMIT` times in a row beyond a limit the template is not run any more, so that it does
    not take as long again for each of many records.
    """

    def __init__(self, pool: TextPool, bundle: Bundle, asking: Asking, check: Check = lambda: None) -> None:
        self._pool = pool
        self._bundle = bundle
        self._asking = asking
        self._check = check
        self._asked = {
            "chat_template": asking.chat_template,
            "template_date": asking.template_date,
            "prefix_token_ids": asking.prefix_token_ids,
        }
        self._num_at_limit = 0

    def prompt(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> tuple[int, ...]:
        """Return the tokens that ask for a record's last answer, with `shots` as worked examples before it."""
        return tuple(self._ask({"do": "prompt", **_records(self.instructed(record), shots)})["ids"])

    def prompt_under(
        self, system_prompt: str, record: SingleRecord, shots: Sequence[SingleRecord] = ()
    ) -> tuple[int, ...]:
        """Return these tokens as another system prompt gives them; empty: as the record has it."""
        asked = instructed(record, system_prompt) if system_prompt else record
        return tuple(self._ask({"do": "prompt", **_records(asked, shots)})["ids"])

    def instructed(self, record: SingleRecord) -> SingleRecord:
        """Return a record as it is asked, under the system prompt where there is one."""
        return instructed(record, self._asking.system_prompt) if self._asking.system_prompt else record

    def answer(self, record: SingleRecord, shots: Sequence[SingleRecord] = ()) -> Rendered:
        """Return the tokens of a record, its last answer alone learnt, with `shots` before it."""
        answer = self._ask({"do": "answer", **_records(self.instructed(record), shots)})
        return Rendered(
            input_ids=tuple(answer["ids"]),
            loss_mask=tuple(answer["mask"]),
            ending_ids=tuple(answer["endings"]),
            num_asking=answer["num_asking"],
        )

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return the tokens that ask for the next assistant turn of a conversation given as JSON values."""
        request = {"do": "conversation", "messages": list(messages), "tools": list(tools)}
        return tuple(self._ask(request)["ids"])

    def raw(self, text: str) -> tuple[int, ...]:
        """Return the tokens of plain text to continue."""
        return tuple(self._ask({"do": "raw", "text": text})["ids"])

    def stops(self, before: Before | None = None) -> Stops:
        """Return the tokens that end an answer; `before` is what stands before one, and the template takes.

        Raises FailedPrecondition and InvalidArgument for what is refused.
        """
        known = self._describe(before or Before())
        return Stops(
            token_ids=frozenset(known["stop_token_ids"]) | frozenset(self._asking.stop_token_ids),
            unknown=known["unknown_ending"],
            end_turns=known["end_turns"],
        )

    def start_token(self) -> int | None:
        """Return the token that begins texts, else that which ends them; None: neither is there. Raises as `stops`."""
        found: int | None = self._describe(Before())["start_token_id"]
        return found

    @property
    def template_date(self) -> str:
        """What templates see as today, YYYY-MM-DD."""
        return self._asking.template_date

    def template_digest(self) -> str:
        """Return the sha256 of the template in hex; empty when there is none. Raises as `stops`."""
        if self._asking.chat_template:
            return hashlib.sha256(self._asking.chat_template.encode()).hexdigest()
        digest: str = self._describe(Before())["own_template_digest"]
        return digest

    def _describe(self, before: Before) -> dict[str, Any]:
        try:
            return self._ask({"do": "describe", "messages": before.messages, "tools": before.tools})
        except RenderingError as error:
            raise FailedPrecondition(str(error), reason=error.reason) from error
        except TemplateError as error:
            raise InvalidArgument(str(error), reason=Reason.TEMPLATE_INVALID) from error

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        asked = {**request, "asked": self._asked}
        if self._num_at_limit == MAX_AT_LIMIT:
            raise TemplateError(
                f"the chat template took more than it may {MAX_AT_LIMIT} times, and is not run again"
            )
        try:
            answer = self._pool.ask(self._bundle, asked, key=self._asking.chat_template, check=self._check)
        except TextRefused as error:
            self._num_at_limit += error.at_limit
            if error.kind == "template":
                raise TemplateError(error.message) from error
            raise RenderingError(error.reason, error.message) from error
        self._num_at_limit = 0
        return answer


class TextDecoder:
    """Turns tokens of one model into text; the texts of a few tokens that came last are remembered."""

    def __init__(self, pool: TextPool, bundle: Bundle) -> None:
        self._pool = pool
        self._bundle = bundle
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, ids: Sequence[int], check: Check) -> str:
        """Return the text of tokens.

        Raises:
            FailedPrecondition: MODEL_INVALID, the tokenizer fails on them or takes too much.
            LuthierError: as the methods of `Asker`.
        """
        key = tuple(ids)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        try:
            answer = self._pool.ask(self._bundle, {"do": "decode", "ids": key}, check=check)
        except TextRefused as error:
            raise FailedPrecondition(error.message, reason=error.reason) from error
        text: str = answer["text"]
        with self._lock:
            self._known[key] = text
            if len(self._known) > _KEPT_TEXTS:
                self._known.popitem(last=False)
        return text


def _records(record: SingleRecord, shots: Sequence[SingleRecord]) -> dict[str, Any]:
    return {"record": record_to_json(record), "shots": [record_to_json(shot) for shot in shots]}
