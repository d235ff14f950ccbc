"""One record to its rows: what runs beside templates and tokenizers that nobody has read, and what it answers."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from luthier.errors import InvalidArgument, Reason
from luthier.text import rendering as text
from luthier.text.findings import Finding
from luthier.text.panics import TokenizerError, tokenizer_errors
from luthier.text.records import SingleRecord, record_from_json
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import TokenizerBundle


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
    """

    bundle_folder: str
    chat_template: str
    mask_mode: str
    max_tokens: int
    length_policy: str
    template_date: str
    split_turns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How a model that learns the rows is asked; `stop_token_ids` are those that no template is needed for."""

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
        unsupervised: why no token is learnt; empty when one is.
    """

    ids: str
    mask: str
    truncated: bool
    num_supervised: int
    unsupervised: str

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
        rows: its rows, less those that are dropped.
        num_dropped: rows that are too long.
        findings: what was found in the rows that are there.
        ending_ids: tokens that end its answers.
        refused: why it cannot be rendered; None when it can.
    """

    rows: tuple[RenderedRow, ...] = ()
    num_dropped: int = 0
    findings: tuple[Finding, ...] = ()
    ending_ids: tuple[int, ...] = ()
    refused: Refused | None = None


class RecordRenderer:
    """Renders one record after the other.

    Raises InvalidArgument MODEL_INVALID, TEMPLATE_INVALID for a tokenizer or a template that cannot be used.
    """

    def __init__(self, settings: RecordSettings) -> None:
        self._settings = settings
        bundle = _bundle(settings)
        self._renderer = _renderer(settings, bundle)
        self._eos = bundle.special_id("eos_token")

    def teaching(self) -> Teaching:
        """Return how a model is asked that learns the rows."""
        return Teaching(
            effective_template=self._renderer.effective_template,
            prefix_token_ids=self._renderer.prefix_ids,
            stop_token_ids=() if self._eos is None else (self._eos,),
        )

    def render(self, record: str) -> RenderedRecord:
        """Render a record given as its canonical JSON; what refuses it is in what is returned."""
        policy = text.LengthPolicy(self._settings.length_policy)
        try:
            with tokenizer_errors():
                rendered = self._rendered(text.one_answer(record_from_json(record)))
            fitted = [text.fit(one, self._settings.max_tokens, policy) for one in rendered]
        except text.RenderingError as error:
            return RenderedRecord(refused=Refused(reason=error.reason, message=str(error), hint=error.hint))
        except TokenizerError as error:
            return RenderedRecord(refused=Refused(reason=error.reason, message=str(error)))
        except TemplateError as error:
            return RenderedRecord(refused=Refused(reason=Reason.TEMPLATE_INVALID, message=str(error)))
        kept = [(whole, part) for whole, part in zip(rendered, fitted, strict=True) if part is not None]
        return RenderedRecord(
            rows=tuple(_row(whole, part) for whole, part in kept),
            num_dropped=len(rendered) - len(kept),
            findings=tuple(finding for whole, _ in kept for finding in whole.findings),
            ending_ids=tuple(sorted({token for whole, _ in kept for token in whole.ending_ids})),
        )

    def _rendered(self, record: SingleRecord) -> Sequence[text.Rendered]:
        if self._settings.split_turns:
            return self._renderer.render_turns(record)
        return (self._renderer.render(record),)


def _bundle(settings: RecordSettings) -> TokenizerBundle:
    try:
        with tokenizer_errors():
            return TokenizerBundle.load(Path(settings.bundle_folder))
    except ValueError as error:
        raise InvalidArgument(
            f"the model's tokenizer cannot be used: {error}", reason=Reason.MODEL_INVALID
        ) from error


def _renderer(settings: RecordSettings, bundle: TokenizerBundle) -> text.Renderer:
    mask_mode = text.MaskMode(settings.mask_mode) if settings.mask_mode else None
    try:
        return text.Renderer(
            bundle,
            today=date.fromisoformat(settings.template_date),
            template=settings.chat_template or None,
            mask_mode=mask_mode,
        )
    except TemplateError as error:
        raise InvalidArgument(
            f"{error}; pass one that does by --chat-template FILE (chat_template)",
            reason=Reason.TEMPLATE_INVALID,
        ) from error


def _row(whole: text.Rendered, fitted: text.Rendered) -> RenderedRow:
    return RenderedRow(
        ids=base64.b64encode(array("i", fitted.input_ids).tobytes()).decode(),
        mask=base64.b64encode(bytes(fitted.loss_mask)).decode(),
        truncated=fitted.truncated,
        num_supervised=fitted.num_supervised,
        unsupervised="" if fitted.num_supervised else _why_unsupervised(whole, fitted),
    )


def _why_unsupervised(whole: text.Rendered, fitted: text.Rendered) -> str:
    if whole.num_supervised:
        return (
            f"no token is learnt: the first one stands at {whole.loss_mask.index(True)}, "
            f"the record is cut at {len(fitted.input_ids)} tokens"
        )
    return "no token is learnt: every assistant turn has weight 0 or is empty"
