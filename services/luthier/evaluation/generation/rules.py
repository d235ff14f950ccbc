"""What may be asked for: defaults and limits."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.errors import FieldViolation, Reason
from luthier.runtime.field_limits import (
    Limit,
    LimitTable,
    characters,
    count,
    demanded,
    limit_violations,
    not_negative,
    refuse,
    whole,
)
from luthier.v1.evaluation_pb2 import FINISH_REASON_UNSPECIFIED
from luthier.v1.evaluation_service_pb2 import GenerateTextRequest, ScoreTextsRequest
from luthier.worker.v1.worker_service_pb2 import PushGenerationRequest

MAX_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 256
LIMITS: LimitTable = {
    "max_new_tokens": demanded(whole(1, MAX_NEW_TOKENS)),
    "temperature": not_negative(10),
    "top_p": demanded(Limit(rule="must be in (0, 1]", allows=lambda value: 0 < value <= 1)),
    "conversation.messages[].weight": Limit(rule="must be 0 or 1", allows=lambda value: value in {0, 1}),
}
"""Of a request with every default filled in."""


MAX_TEXTS = 64
MAX_TEXT_CHARACTERS = 1 << 18
TEXTS_LIMITS: LimitTable = {
    "texts": count(MAX_TEXTS, "texts", least=1),
    "texts[].context": characters(MAX_TEXT_CHARACTERS),
    "texts[].continuation": demanded(characters(MAX_TEXT_CHARACTERS)),
}
"""Of texts to be scored."""


def is_last(piece: PushGenerationRequest) -> bool:
    """Tell whether nothing follows a piece of an answer: it has a finish reason or an error."""
    return piece.finish_reason != FINISH_REASON_UNSPECIFIED or piece.HasField("error")


def resolved(request: GenerateTextRequest) -> GenerateTextRequest:
    """Return a request with every default filled in."""
    filled = GenerateTextRequest()
    filled.CopyFrom(request)
    filled.max_new_tokens = request.max_new_tokens or DEFAULT_NEW_TOKENS
    filled.top_p = request.top_p or 1.0
    return filled


def check(request: GenerateTextRequest) -> None:
    """Raise InvalidArgument that names every field of a resolved request that can never be right."""
    refuse([*_input_violations(request), *limit_violations(request, LIMITS)])


def check_texts(request: ScoreTextsRequest) -> None:
    """Raise InvalidArgument that names every field of a request for scores that can never be right."""
    refuse([*limit_violations(request, TEXTS_LIMITS), *_rolling_violations(request)])


def _rolling_violations(request: ScoreTextsRequest) -> Iterator[FieldViolation]:
    for index, text in enumerate(request.texts):
        if text.rolling and text.context:
            description = "must be empty where the continuation is rolling, as windows have no room for it"
            yield FieldViolation(field=f"texts[{index}].context", description=description)


def _input_violations(request: GenerateTextRequest) -> Iterator[FieldViolation]:
    turns = request.conversation.messages
    if not turns and not request.prompt:
        yield FieldViolation(
            field="input",
            description="conversation with at least one turn, or prompt, must be set",
            reason=Reason.FIELD_REQUIRED,
        )
    if turns and turns[-1].role not in {"user", "tool"}:
        description = f"the last turn must be the user's or a tool's, got role {turns[-1].role!r}"
        yield FieldViolation(field="conversation.messages", description=description)
