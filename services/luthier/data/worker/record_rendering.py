"""One record to its rows: what runs beside templates and tokenizers that nobody has read, and what it answers."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from luthier.errors import InvalidArgument, Reason
from luthier.text import rendering as text
from luthier.text.findings import Finding
from luthier.text.lengths import LengthLimit, LengthPolicy, fit, why_unsupervised
from luthier.text.panics import TokenizerError, tokenizer_errors
from luthier.text.records import Record, record_from_json
from luthier.text.spans import Between
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import TokenizerBundle
from luthier.text.units import (
    RenderingKind,
    Unit,
    preference_unit,
    prompt_unit,
    reference_record,
    taught_record,
    unpaired_unit,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """How each record is rendered.

    Attributes:
        bundle_folder: holds the tokenizer bundle.
        chat_template: template in place of the model's; empty: the model's own.
        mask_mode: name of a `text.MaskMode`; empty: all assistant turns of a conversation, the completion of a prompt.
        max_tokens: longest row.
        length_policy: name of a `text.LengthPolicy`.
        template_date: what templates see as today, YYYY-MM-DD.
        split_turns: whether each answer has a row of its own.
        kind: name of a `RenderingKind`.
    """

    bundle_folder: str
    chat_template: str
    mask_mode: str
    max_tokens: int
    length_policy: str
    template_date: str
    split_turns: bool
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How a model that learns the rows is asked; `stop_token_ids` are those that are known without a record."""

    effective_template: str
    prefix_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRow:
    """Tokens of one row.

    Attributes:
        ids: the tokens, 32-bit integers in the machine's order, in base64: JSON takes long for long lists.
        mask: a byte for each token, 1 where it is learnt, in base64.
        truncated: whether it was cut.
        unsupervised: why no token is learnt; empty when one is, or none is meant to be.
        role: what it is in its unit; empty: it is all of it.
    """

    ids: str
    mask: str
    truncated: bool
    num_supervised: int
    unsupervised: str
    role: str = ""

    def token_bytes(self) -> bytes:
        """Return the tokens as bytes, four each."""
        return base64.b64decode(self.ids)

    def mask_bytes(self) -> bytes:
        """Return the mask as bytes, one for each token."""
        return base64.b64decode(self.mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why a record cannot be rendered; `hint` is what can be done about it, empty when nothing."""

    reason: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRecord:
    """What became of a record.

    Attributes:
        rows: its rows, less those that are dropped; with roles they are one unit.
        num_dropped: rows, or units, that are too long.
        findings: what was found in the rows that are there.
        ending_ids: tokens that end its answers.
        no_row: why it has no row though nothing is too long; empty when it has one.
        refused: why it cannot be rendered; None when it can.
    """

    rows: tuple[RenderedRow, ...] = ()
    num_dropped: int = 0
    findings: tuple[Finding, ...] = ()
    ending_ids: tuple[int, ...] = ()
    no_row: str = ""
    refused: Refused | None = None


class RecordRenderer:
    """Renders one record after the other.

    Args:
        settings: how.
        between: as `text.Renderer` has it; called when the tokenizer is read, too.

    Raises:
        InvalidArgument: MODEL_INVALID, TEMPLATE_INVALID; the tokenizer or the template cannot be used.
    """

    def __init__(self, settings: RecordSettings, between: Between = lambda _: None) -> None:
        self._kind = RenderingKind(settings.kind)
        self._split_turns = settings.split_turns
        self._limit = LengthLimit(max_tokens=settings.max_tokens, policy=LengthPolicy(settings.length_policy))
        bundle = _bundle(settings)
        between(0.0)
        self._renderer = _renderer(settings, bundle, between)
        self._eos = bundle.special_id("eos_token")
        # Prompts show no answer that ends.
        self._stops = self._renderer.stops() if self._kind is RenderingKind.PROMPT else None

    def teaching(self) -> Teaching:
        """Return how a model is asked that learns the rows."""
        stops = {self._eos} if self._stops is None else self._stops.token_ids
        return Teaching(
            effective_template=self._renderer.effective_template,
            prefix_token_ids=self._renderer.prefix_ids,
            stop_token_ids=tuple(sorted(one for one in stops if one is not None)),
        )

    def render(self, record: str, other: str = "") -> RenderedRecord:
        """Render a record given as its canonical JSON; what refuses it is in what is returned.

        `other` is the canonical JSON of a record whose answer an UNPAIRED rendering shows behind this one's prompt;
        empty: there is none.
        """
        try:
            with tokenizer_errors():
                return self._rendered(record_from_json(record), other)
        except text.RenderingError as error:
            return RenderedRecord(refused=Refused(reason=error.reason, message=str(error), hint=error.hint))
        except TokenizerError as error:
            return RenderedRecord(refused=Refused(reason=error.reason, message=str(error)))
        except TemplateError as error:
            return RenderedRecord(refused=Refused(reason=Reason.TEMPLATE_INVALID, message=str(error)))

    def _rendered(self, record: Record, other: str) -> RenderedRecord:
        match self._kind:
            case RenderingKind.SUPERVISED:
                return self._supervised(record)
            case RenderingKind.PREFERENCE:
                return _unit(preference_unit(self._renderer, record, self._limit))
            case RenderingKind.UNPAIRED:
                answered = reference_record(record_from_json(other)) if other else None
                return _unit(unpaired_unit(self._renderer, record, answered, self._limit))
            case RenderingKind.PROMPT:
                assert self._stops is not None, "they were looked for at the start"
                return _unit(prompt_unit(self._renderer, record, self._stops, self._limit))

    def _supervised(self, record: Record) -> RenderedRecord:
        taught, told = taught_record(record)
        if taught is None:
            return RenderedRecord(findings=told, no_row="no row: the answer is labelled undesirable")
        if self._split_turns:
            rendered: Sequence[text.Rendered] = self._renderer.render_turns(taught)
        else:
            rendered = (self._renderer.render(taught),)
        fitted = [fit(one, self._limit) for one in rendered]
        kept = [(whole, part) for whole, part in zip(rendered, fitted, strict=True) if part is not None]
        found = [finding for whole, _ in kept for finding in whole.findings]
        return RenderedRecord(
            rows=tuple(_row(part, why_unsupervised(whole, part)) for whole, part in kept),
            num_dropped=len(rendered) - len(kept),
            findings=(*told, *found) if kept else (),
            ending_ids=_ending_ids(whole for whole, _ in kept),
            no_row="" if rendered else "no row: every assistant turn has weight 0",
        )


def _bundle(settings: RecordSettings) -> TokenizerBundle:
    try:
        with tokenizer_errors():
            return TokenizerBundle.load(Path(settings.bundle_folder))
    except ValueError as error:
        raise InvalidArgument(
            f"the model's tokenizer cannot be used: {error}", reason=Reason.MODEL_INVALID
        ) from error


def _renderer(settings: RecordSettings, bundle: TokenizerBundle, between: Between) -> text.Renderer:
    mask_mode = text.MaskMode(settings.mask_mode) if settings.mask_mode else None
    try:
        return text.Renderer(
            bundle,
            today=date.fromisoformat(settings.template_date),
            template=settings.chat_template or None,
            mask_mode=mask_mode,
            between=between,
        )
    except TemplateError as error:
        raise InvalidArgument(
            f"{error}; pass one that does by --chat-template FILE (chat_template)",
            reason=Reason.TEMPLATE_INVALID,
        ) from error


def _unit(unit: Unit) -> RenderedRecord:
    return RenderedRecord(
        rows=tuple(_row(one.rendered, unit.idle, one.role) for one in unit.rows),
        num_dropped=0 if unit.rows else 1,
        findings=unit.findings,
        ending_ids=_ending_ids(one.rendered for one in unit.rows),
    )


def _ending_ids(rendered: Iterable[text.Rendered]) -> tuple[int, ...]:
    return tuple(sorted({token for one in rendered for token in one.ending_ids}))


def _row(fitted: text.Rendered, unsupervised: str, role: str = "") -> RenderedRow:
    return RenderedRow(
        ids=base64.b64encode(array("i", fitted.input_ids).tobytes()).decode(),
        mask=base64.b64encode(bytes(fitted.loss_mask)).decode(),
        truncated=fitted.truncated,
        num_supervised=fitted.num_supervised,
        unsupervised=unsupervised,
        role=role,
    )
