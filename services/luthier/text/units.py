"""What a record becomes in a rendering of each kind: rows, each with its role, that share a forward pass.

All rows of a unit begin with the tokens that ask for its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from luthier.text.endings import Stops
from luthier.text.findings import Finding, FindingKind
from luthier.text.lengths import LengthLimit, LengthPolicy, fit, why_unsupervised
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionRecord,
    Message,
    PairRecord,
    Record,
    SingleRecord,
    message_to_object,
)
from luthier.text.rendering import Rendered, Renderer
from luthier.text.spans import AskedTexts, RenderingError
from luthier.text.templates import TemplateError


class RenderingKind(StrEnum):
    """What records become. The names are those of the API."""

    SUPERVISED = "SUPERVISED"
    PREFERENCE = "PREFERENCE"
    UNPAIRED = "UNPAIRED"
    PROMPT = "PROMPT"


class Role(StrEnum):
    """What a row is in its unit."""

    CHOSEN = "chosen"
    REJECTED = "rejected"
    DESIRABLE = "desirable"
    UNDESIRABLE = "undesirable"
    MISMATCHED = "mismatched"
    PROMPT = "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRow:
    """One row of a unit, cut where it is too long."""

    role: Role
    rendered: Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows that share a forward pass.

    Attributes:
        rows: in the order of their roles; none when the record is dropped for its length.
        findings: what was found in the record and its rows.
        idle: why nothing is learnt from it, and then no token of any row is; empty when something is, or when nothing
            is meant to be.
    """

    rows: tuple[UnitRow, ...] = ()
    findings: tuple[Finding, ...] = ()
    idle: str = ""


def taught_record(record: Record) -> tuple[SingleRecord | None, tuple[Finding, ...]]:
    """Return what a SUPERVISED rendering learns of a record, and what to tell of it.

    It is the record itself, the chosen side of a pair, and None for a record labelled undesirable.
    """
    if isinstance(record, PairRecord):
        message = "the rejected side is not used"
        return chosen_record(record), (Finding(kind=FindingKind.CHOSEN_SIDE_TAKEN, message=message),)
    if record.label is None:
        return record, ()
    if not record.label:
        return None, (Finding(kind=FindingKind.UNDESIRABLE_LEFT_OUT, message="the label is false"),)
    return record, (Finding(kind=FindingKind.DESIRABLE_TAKEN, message="the label is true"),)


def reference_record(record: Record) -> SingleRecord:
    """Return a record with the answer that is right: of a pair the chosen one, else its own.

    Raises:
        RenderingError: the answer is labelled undesirable.
    """
    if isinstance(record, PairRecord):
        return chosen_record(record)
    if record.label is False:
        raise RenderingError(
            "INVALID_FIELD", "must have an answer that is right, got one labelled undesirable"
        )
    return record


def chosen_record(pair: PairRecord) -> SingleRecord:
    """Return a pair's prompt with its chosen answer."""
    return _with_answer(pair, pair.chosen)


def rejected_record(pair: PairRecord) -> SingleRecord:
    """Return a pair's prompt with its rejected answer."""
    return _with_answer(pair, pair.rejected)


def with_text(record: SingleRecord, text: str) -> SingleRecord:
    """Return a record with another last answer, a plain text."""
    if isinstance(record, CompletionRecord):
        return replace(record, completion=text)
    last = replace(record.messages[-1], content=text, tool_calls=())
    return replace(record, messages=(*record.messages[:-1], last))


def preference_unit(renderer: Renderer, record: Record, limit: LengthLimit) -> Unit:
    """Return a pair as the prompt with the chosen and the prompt with the rejected answer.

    Raises:
        RenderingError: RENDERING_KIND_MISMATCH for a record that is no pair; the template writes the prompt differently
            before the two answers; as `Renderer.render`; SEQUENCE_TOO_LONG under the policy FAIL.
        TemplateError: the template refuses a side.
    """
    if not isinstance(record, PairRecord):
        raise _mismatch(RenderingKind.PREFERENCE, "pairs", record)
    sides: Mapping[Role, tuple[Message, ...] | str] = {
        Role.CHOSEN: record.chosen,
        Role.REJECTED: record.rejected,
    }
    first = len(record.messages) if isinstance(record, ChatPair) else 0
    asked = AskedTexts()
    whole = {}
    for role, side in sides.items():
        _require_first_learnt(role, side)
        # What asks for an answer does not depend on what follows it.
        asked = asked.upto(first)
        whole[role] = renderer.continued(_with_answer(record, side), first, asked)
    chosen, rejected = whole.values()
    _require_shared(chosen, rejected, "the rejected answer")
    findings = tuple(
        replace(finding, message=f"{role}: {finding.message}")
        for role, rendered in whole.items()
        for finding in rendered.findings
    )
    fitted = _fitted(whole, limit)
    if not fitted:
        return Unit()
    cut = [row.rendered.input_ids for row in fitted]
    if chosen.input_ids == rejected.input_ids:
        kind, idle = FindingKind.EQUAL_SIDES, "both sides are the same tokens"
    elif cut[0] == cut[1]:
        kind = FindingKind.EQUAL_WITHIN_LIMIT
        idle = f"both sides are the same in their first {limit.max_tokens} tokens, where they are cut"
    else:
        return _unit(fitted, findings, _why_idle(whole, fitted))
    return _unit(fitted, (*findings, Finding(kind=kind, message=idle)), idle)


def unpaired_unit(renderer: Renderer, record: Record, other: SingleRecord | None, limit: LengthLimit) -> Unit:
    """Return a labelled record, and its prompt with the answer of another record.

    The second row is cut where it is too long, whatever the policy says: the record itself is not.

    Args:
        renderer: renders both.
        record: the record.
        other: has the other answer; None: there is none, and the record is not used.
        limit: of the rows.

    Raises:
        RenderingError: RENDERING_KIND_MISMATCH for a record without a label; else as `preference_unit`.
        TemplateError: the template refuses a row.
    """
    if isinstance(record, PairRecord) or record.label is None:
        raise _mismatch(RenderingKind.UNPAIRED, "answers with a label", record)
    role = Role.DESIRABLE if record.label else Role.UNDESIRABLE
    first = len(record.messages) - 1 if isinstance(record, ChatRecord) else 0
    asked = AskedTexts()
    whole = {role: renderer.continued(record, first, asked)}
    findings = whole[role].findings
    fitted = _fitted(whole, limit)
    if not fitted:
        return Unit()
    if other is None:
        idle = "no other record has another prompt and another answer"
        finding = Finding(kind=FindingKind.NO_MISMATCHED_ANSWER, message=idle)
        return _unit(fitted, (*findings, finding), idle)
    mismatched = _mismatched(renderer, record, other, asked)
    cutting = replace(limit, policy=LengthPolicy.TRUNCATE)
    second = {Role.MISMATCHED: mismatched}
    fitted += _fitted(second, cutting)
    if fitted[-1].rendered.truncated:
        message = f"its prompt with another record's answer has {len(mismatched.input_ids)} tokens"
        findings += (Finding(kind=FindingKind.MISMATCHED_CUT, message=message),)
    idle = _why_idle({**whole, **second}, fitted)
    if not idle:
        _require_shared(whole[role], mismatched, "another record's answer")
    return _unit(fitted, findings, idle)


def prompt_unit(renderer: Renderer, record: Record, stops: Stops, limit: LengthLimit) -> Unit:
    """Return the tokens that ask for a record's last answer, or for the answers of a pair. Nothing is learnt.

    `stops` are the tokens that end an answer as far as they are known without the record.

    Raises:
        RenderingError: there is no token to ask with; as `Renderer.conversation`; SEQUENCE_TOO_LONG under the policy
            FAIL.
        TemplateError: the template refuses the conversation.
    """
    if isinstance(record, ChatRecord | ChatPair):
        turns = record.messages if isinstance(record, ChatPair) else record.messages[:-1]
        rendered = renderer.asking(turns, record.tools)
        if stops.unknown:
            stops = renderer.stops([message_to_object(turn) for turn in turns], record.tools)
        unknown = stops.unknown or (
            "" if stops.end_turns else "the chat template ends a turn without a special token"
        )
    else:
        ids = renderer.raw(record.prompt)
        rendered = Rendered(input_ids=ids, loss_mask=(False,) * len(ids), num_asking=len(ids))
        unknown = "" if stops.token_ids else "the tokenizer names no eos_token"
    if not rendered.input_ids:
        raise RenderingError(
            "INVALID_FIELD", "must have a prompt of at least one token to ask with, got none"
        )
    findings = rendered.findings
    if unknown:
        findings += (Finding(kind=FindingKind.END_UNKNOWN, message=unknown),)
    rendered = replace(rendered, ending_ids=tuple(sorted(stops.token_ids)))
    return Unit(rows=_fitted({Role.PROMPT: rendered}, limit), findings=findings)


def _mismatch(kind: RenderingKind, needed: str, record: Record) -> RenderingError:
    if isinstance(record, PairRecord):
        found, suiting = "a pair", "PREFERENCE"
    else:
        found = "a conversation" if isinstance(record, ChatRecord) else "a prompt-completion record"
        found += " without a label" if record.label is None else " with a label"
        suiting = "SUPERVISED" if record.label is None else "UNPAIRED"
    return RenderingError(
        "RENDERING_KIND_MISMATCH",
        f"a rendering of kind {kind} needs {needed}, got {found}",
        f"pass --kind {suiting.lower()} (kind {suiting}), or render a version of {needed}",
    )


def _with_answer(pair: PairRecord, side: tuple[Message, ...] | str) -> SingleRecord:
    if isinstance(pair, ChatPair):
        assert not isinstance(side, str), "a conversation goes on with turns"
        return ChatRecord(messages=(*pair.messages, *side), tools=pair.tools)
    assert isinstance(side, str), "a text goes on with text"
    return CompletionRecord(prompt=pair.prompt, completion=side)


def _mismatched(renderer: Renderer, record: SingleRecord, other: Record, asked: AskedTexts) -> Rendered:
    if isinstance(record, ChatRecord):
        assert isinstance(other, ChatRecord), "conversations get answers of conversations"
        first = len(record.messages) - 1
        made: SingleRecord = replace(record, messages=(*record.messages[:first], other.messages[-1]))
    else:
        assert isinstance(other, CompletionRecord), "plain text gets answers of plain text"
        first, made = 0, replace(record, completion=other.completion)
    try:
        return renderer.continued(made, first, asked)
    except RenderingError as error:
        message = f"its prompt with another record's answer cannot be rendered: {error}"
        raise RenderingError(error.reason, message, error.hint) from error
    except TemplateError as error:
        message = f"the chat template refuses its prompt with another record's answer: {error}"
        raise TemplateError(message) from error


def _require_first_learnt(role: Role, side: tuple[Message, ...] | str) -> None:
    if not isinstance(side, str) and side[0].weight == 0:
        message = (
            f"{role}[0].weight must be 1 or unset, as both answers of a pair are learnt from there on, got 0"
        )
        raise RenderingError("INVALID_FIELD", message)


def _require_shared(one: Rendered, other: Rendered, what: str) -> None:
    """Check that the answers of a unit stand behind the same tokens, those that ask for them."""
    before, also = _before_answer(one), _before_answer(other)
    if one.num_asking != other.num_asking or before != also:
        raise RenderingError(
            "TEMPLATE_INVALID",
            f"the chat template must write what stands before an answer in the same way whatever the answer is: there "
            f"are {len(before)} tokens before the answer, and {len(also)} others before {what}",
            "pass --chat-template FILE (chat_template) with a template that does",
        )


def _before_answer(rendered: Rendered) -> tuple[int, ...]:
    learnt = (place for place, flag in enumerate(rendered.loss_mask) if flag)
    return rendered.input_ids[: next(learnt, rendered.num_asking)]


def _fitted(whole: Mapping[Role, Rendered], limit: LengthLimit) -> tuple[UnitRow, ...]:
    """Return all rows within a limit; none when one of them is dropped."""
    rows = []
    for role, rendered in whole.items():
        try:
            fitted = fit(rendered, limit)
        except RenderingError as error:
            raise RenderingError(error.reason, f"{role}: {error}", error.hint) from error
        if fitted is None:
            return ()
        rows.append(UnitRow(role=role, rendered=fitted))
    return tuple(rows)


def _why_idle(whole: Mapping[Role, Rendered], fitted: Sequence[UnitRow]) -> str:
    """Return why a unit cannot be learnt from as one row of it cannot; empty when all can."""
    reasons = ((row.role, why_unsupervised(whole[row.role], row.rendered)) for row in fitted)
    return next((f"{role}: {why}" for role, why in reasons if why), "")


def _unit(rows: Sequence[UnitRow], findings: tuple[Finding, ...], idle: str) -> Unit:
    if idle:
        rows = [
            replace(row, rendered=replace(row.rendered, loss_mask=(False,) * len(row.rendered.input_ids)))
            for row in rows
        ]
    return Unit(rows=tuple(rows), findings=findings, idle=idle)
