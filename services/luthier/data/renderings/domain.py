"""Renderings as values, with the rules that they obey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from luthier.data.shards import Shard, check_contiguous
from luthier.data.splits import Split
from luthier.errors import FailedPrecondition, Failure, FieldViolation, InvalidArgument, Reason

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_UNSUPERVISED = 1000
"""Records without a supervised token that are kept; all are counted."""
MAX_ERRORS = 1000
"""Records that cannot be rendered that are kept; all are counted."""
MAX_FINDING_RECORDS = 100
"""Records of a finding that are kept; all are counted."""


class RenderingState(StrEnum):
    """Where a rendering stands. READY and FAILED are final."""

    QUEUED = "QUEUED"
    RENDERING = "RENDERING"
    READY = "READY"
    FAILED = "FAILED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"


class MaskMode(StrEnum):
    """Which tokens are learnt. DEFAULT: all assistant turns of a conversation, the completion of a prompt."""

    DEFAULT = "DEFAULT"
    ALL_ASSISTANT_TURNS = "ALL_ASSISTANT_TURNS"
    LAST_TURN = "LAST_TURN"
    MESSAGE_WEIGHT = "MESSAGE_WEIGHT"
    COMPLETION = "COMPLETION"


class LengthPolicy(StrEnum):
    """What happens to a record of more than max_tokens tokens."""

    DROP = "DROP"
    TRUNCATE = "TRUNCATE"
    FAIL = "FAIL"


class TemplateErrorPolicy(StrEnum):
    """What happens when records cannot be rendered."""

    STRICT = "STRICT"
    SKIP = "SKIP"


class FindingKind(StrEnum):
    """What is found in records and does not stop a rendering."""

    JOINED_BOUNDARY = "JOINED_BOUNDARY"
    INEXACT_BOUNDARY = "INEXACT_BOUNDARY"
    ONLY_END_LEARNT = "ONLY_END_LEARNT"
    TURN_NOT_WRITTEN = "TURN_NOT_WRITTEN"
    ARGUMENTS_NOT_OBJECT = "ARGUMENTS_NOT_OBJECT"
    ASKED_DIFFERENTLY = "ASKED_DIFFERENTLY"
    END_NOT_LEARNT = "END_NOT_LEARNT"


class View(StrEnum):
    """What each row of a stream carries: tokens and masks, or their counts."""

    FULL = "FULL"
    LENGTHS = "LENGTHS"


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """How a count is distributed over records; percentiles by nearest rank."""

    count: int = 0
    sum: int = 0
    minimum: int = 0
    maximum: int = 0
    mean: float = 0.0
    p5: int = 0
    p50: int = 0
    p95: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingSplitStatistics:
    """Counts of one split of a rendering."""

    split: Split
    tokens: LengthStatistics
    supervised_tokens: LengthStatistics
    num_dropped: int = 0
    num_truncated: int = 0
    num_unsupervised: int = 0
    num_records: int = 0
    num_refused: int = 0
    num_without_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedRecord:
    """A record that cannot be rendered, and why."""

    filename: str
    line: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRecord:
    """A record that has a finding; `message` says where in it and what."""

    filename: str
    line: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingFinding:
    """What was found, in how many records, and the first `MAX_FINDING_RECORDS` of them."""

    kind: FindingKind
    num_records: int
    records: tuple[FindingRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupervisedRecord:
    """A record that teaches nothing, and why."""

    record_id: str
    filename: str
    line: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """What a rendering needs to know of a model. `context_length` 0: the model does not say."""

    name: str
    state: str
    kind: str
    digest: str
    tokenizer_digest: str
    context_length: int
    base_model: str = ""


class ReadyVersion(Protocol):
    """A READY dataset version."""

    @property
    def digest(self) -> str:
        """Digest of its content."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Its records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderingOutcome:
    """What a worker brings of a rendering; `tokenizer_blob` is the tokenizer.json that made the tokens.

    `errors` are the first `MAX_ERRORS` records that cannot be rendered, `num_errors` counts all. A rendering that
    fails for them has no shards.
    `effective_template`, `prefix_token_ids` and `stop_token_ids` say how a model that learns it is asked.
    """

    shards: tuple[Shard, ...]
    split_statistics: tuple[RenderingSplitStatistics, ...]
    unsupervised_records: tuple[UnsupervisedRecord, ...]
    warnings: tuple[str, ...]
    digest: str
    tokenizer_blob: str
    errors: tuple[RefusedRecord, ...] = ()
    num_errors: int = 0
    findings: tuple[RenderingFinding, ...] = ()
    effective_template: str = ""
    prefix_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Tokens and loss masks of a version under one tokenizer and template.

    `model_digest`, `tokenizer_digest`, `max_tokens` and `template_date` (YYYY-MM-DD) are frozen at creation.
    `digest`, `shards`, `tokenizer_blob` and what stands with `effective_template` are set when READY, `failure` when
    FAILED.
    """

    name: str
    uid: str
    state: RenderingState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    dataset_version: str
    model: str
    chat_template: str = ""
    mask_mode: MaskMode = MaskMode.DEFAULT
    max_tokens: int = 0
    length_policy: LengthPolicy = LengthPolicy.DROP
    model_digest: str = ""
    tokenizer_digest: str = ""
    template_date: str = ""
    split_statistics: tuple[RenderingSplitStatistics, ...] = ()
    unsupervised_records: tuple[UnsupervisedRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    digest: str = ""
    shards: tuple[Shard, ...] = ()
    tokenizer_blob: str = ""
    effective_template: str = ""
    prefix_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    failure: Failure | None = None
    split_turns: bool = False
    template_error_policy: TemplateErrorPolicy = TemplateErrorPolicy.STRICT
    num_errors: int = 0
    findings: tuple[RenderingFinding, ...] = ()

    @property
    def final(self) -> bool:
        """Whether the rendering never changes again."""
        return self.state in (RenderingState.READY, RenderingState.FAILED, RenderingState.CANCELLED)

    def begun(self) -> Rendering:
        """Return the rendering once a worker has begun. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=RenderingState.RENDERING)

    def queued_again(self) -> Rendering:
        """Return the rendering once its worker was lost. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=RenderingState.QUEUED)

    def cancelling(self) -> Rendering:
        """Return the rendering once it was asked to stop. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=RenderingState.CANCELLING)

    def cancelled(self) -> Rendering:
        """Return the rendering once it has stopped on request. Raises FailedPrecondition when it is final."""
        self._refuse_final()
        return replace(self, state=RenderingState.CANCELLED)

    def rendered(self, outcome: RenderingOutcome) -> Rendering:
        """Return the READY rendering. Raises FailedPrecondition, and InvalidArgument for a bad outcome."""
        self._refuse_final()
        check_contiguous(outcome.shards)
        return replace(
            self,
            state=RenderingState.READY,
            shards=outcome.shards,
            split_statistics=outcome.split_statistics,
            unsupervised_records=outcome.unsupervised_records,
            warnings=outcome.warnings,
            digest=outcome.digest,
            tokenizer_blob=outcome.tokenizer_blob,
            num_errors=outcome.num_errors,
            findings=outcome.findings,
            effective_template=outcome.effective_template,
            prefix_token_ids=outcome.prefix_token_ids,
            stop_token_ids=outcome.stop_token_ids,
        )

    def failed(self, failure: Failure, outcome: RenderingOutcome | None = None) -> Rendering:
        """Return the FAILED rendering; an outcome's count of errors is kept. Raises FailedPrecondition when final."""
        self._refuse_final()
        num_errors = outcome.num_errors if outcome is not None else 0
        return replace(self, state=RenderingState.FAILED, failure=failure, num_errors=num_errors)

    def require_ready(self) -> Rendering:
        """Return the rendering. Raises FailedPrecondition WRONG_STATE unless it is READY."""
        if self.state is RenderingState.READY:
            return self
        why = f": {self.failure.message}" if self.failure is not None else ""
        raise FailedPrecondition(
            f"{self.name} must be READY, it is {self.state}{why}",
            reason=Reason.WRONG_STATE,
            metadata={"name": self.name, "state": self.state},
        )

    def _refuse_ending(self) -> None:
        self._refuse_final()
        if self.state is RenderingState.CANCELLING:
            raise FailedPrecondition(
                f"{self.name} is {self.state} and can only end",
                metadata={"name": self.name, "state": self.state},
            )

    def _refuse_final(self) -> None:
        if self.final:
            raise FailedPrecondition(
                f"{self.name} is {self.state} and never changes again",
                metadata={"name": self.name, "state": self.state},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRendering:
    """What a caller asks for. `max_tokens` 0: the model's context length."""

    dataset_version: str
    model: str
    chat_template: str
    mask_mode: MaskMode
    max_tokens: int
    length_policy: LengthPolicy
    labels: Mapping[str, str]
    split_turns: bool = False
    template_error_policy: TemplateErrorPolicy = TemplateErrorPolicy.STRICT


def rendering_violations(wanted: NewRendering) -> Iterator[FieldViolation]:
    """Yield what is wrong with a new rendering by itself."""
    for field, value in (("dataset_version", wanted.dataset_version), ("model", wanted.model)):
        if not value:
            yield FieldViolation(
                field=f"rendering.{field}",
                description="must be a resource name, got nothing",
                reason=Reason.FIELD_REQUIRED,
            )
    if wanted.max_tokens < 0:
        description = f"must be 0 (the model's context length) or more, got {wanted.max_tokens}"
        yield FieldViolation(field="rendering.max_tokens", description=description)
    if len(wanted.chat_template) > MAX_TEMPLATE_CHARACTERS:
        description = f"must be at most {MAX_TEMPLATE_CHARACTERS} characters, got {len(wanted.chat_template)}"
        yield FieldViolation(field="rendering.chat_template", description=description)


def require_renderable(model: ModelView) -> None:
    """Raise InvalidArgument for an adapter, FailedPrecondition WRONG_STATE for a base model not READY."""
    if model.kind == "ADAPTER":
        raise InvalidArgument.of_fields(
            FieldViolation(
                field="rendering.model",
                description=f"must be a base model, got the adapter {model.name}; "
                f"its base model is {model.base_model}",
            )
        )
    if model.state != "READY":
        raise FailedPrecondition(
            f"{model.name} must be READY, it is {model.state}",
            reason=Reason.WRONG_STATE,
            metadata={"name": model.name, "state": model.state},
        )


def resolve_max_tokens(max_tokens: int, model: ModelView) -> int:
    """Return the longest row in tokens. Raises InvalidArgument when beyond the model or not known."""
    if max_tokens == 0 and model.context_length == 0:
        description = f"must be set because {model.name} does not say its context length, got 0"
        raise InvalidArgument.of_fields(FieldViolation(field="rendering.max_tokens", description=description))
    if model.context_length and max_tokens > model.context_length:
        description = (
            f"must be in 1..{model.context_length}, the context length of {model.name}, got {max_tokens}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="rendering.max_tokens", description=description))
    return max_tokens or model.context_length
