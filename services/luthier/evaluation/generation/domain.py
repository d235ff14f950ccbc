"""Orders for text and the pieces that answer them, as values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from luthier.errors import Failure, FieldViolation, InvalidArgument, Reason
from luthier.evaluation.asking import Asking, TemplateSource

MAX_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 256


class FinishReason(StrEnum):
    """Why generation ended."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str
    name: str = ""
    tool_calls_json: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAt:
    """A model and the digest its files must have."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One answer wanted: turns or a plain prompt, never both. `top_p` is in (0, 1]."""

    generation_id: str
    base_model: ModelAt
    adapter: ModelAt | None
    turns: tuple[Turn, ...]
    tools_json: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    token: str
    asking: Asking = field(default_factory=Asking)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of an answer; the last one has a finish reason or a failure."""

    generation_id: str
    text: str
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    template_source: TemplateSource = TemplateSource.UNSPECIFIED
    failure: Failure | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.failure is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a caller asks for, before models are looked up."""

    model: str
    turns: tuple[Turn, ...]
    tools_json: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def check_wish(wish: Wish) -> None:
    """Raise InvalidArgument that names every field that can never be right."""
    violations = tuple(_violations(wish))
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _violations(wish: Wish) -> Iterator[FieldViolation]:
    if not wish.turns and not wish.prompt:
        yield FieldViolation(
            field="input",
            description="conversation with at least one turn, or prompt, must be set",
            reason=Reason.FIELD_REQUIRED,
        )
    if wish.turns and wish.turns[-1].role not in {"user", "tool"}:
        description = f"the last turn must be the user's or a tool's, got role {wish.turns[-1].role!r}"
        yield FieldViolation(field="conversation.messages", description=description)
    if not 1 <= wish.max_new_tokens <= MAX_NEW_TOKENS:
        description = f"must be in 1..{MAX_NEW_TOKENS}, got {wish.max_new_tokens}"
        yield FieldViolation(field="max_new_tokens", description=description)
    if not (math.isfinite(wish.temperature) and 0 <= wish.temperature <= 10):
        yield FieldViolation(field="temperature", description=f"must be in 0..10, got {wish.temperature}")
    if not 0 < wish.top_p <= 1:
        yield FieldViolation(field="top_p", description=f"must be in (0, 1], got {wish.top_p}")
