"""What renderings may be: defaults, limits, and which state follows which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date

from luthier.data.result_limits import ERRORS, SHARDS
from luthier.data.shards import check_contiguous
from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, Reason
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    Limit,
    LimitTable,
    characters,
    count,
    demanded,
    limit_violations,
    named,
    refuse,
    required,
    under,
)
from luthier.runtime.labels import label_violations
from luthier.runtime.result_limits import FILE, TEXT, TOKEN_IDS, WARNINGS
from luthier.v1.dataset_pb2 import Split
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import (
    LENGTH_POLICY_DROP,
    LENGTH_POLICY_TRUNCATE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_SUPERVISED,
    RENDERING_KIND_UNSPECIFIED,
    TEMPLATE_ERROR_POLICY_STRICT,
    MaskMode,
    Rendering,
    RenderingFinding,
    RenderingKind,
)
from luthier.worker.v1.task_pb2 import RenderResult

MAX_TEMPLATE_CHARACTERS = 1 << 18
MAX_UNSUPERVISED = 1000
"""Records without a supervised token that are kept; all are counted."""
MAX_FINDING_RECORDS = 100
"""Records of a finding that are kept; all are counted."""
MAX_ROLES = 3
"""Roles that the rows of one rendering have: desirable, undesirable, mismatched."""

LIMITS: LimitTable = {
    "dataset_version": required("must be a resource name"),
    "model": required("must be a resource name"),
    "max_tokens": Limit(
        rule="must be 0 (the model's context length) or more", allows=lambda value: value >= 0
    ),
    "chat_template": characters(MAX_TEMPLATE_CHARACTERS),
}
RESULT_LIMITS: LimitTable = {
    **SHARDS,
    "split_statistics": count(len(Split.keys()) - 1, "splits"),
    "split_statistics[].split": named(Split.DESCRIPTOR),
    "split_statistics[].tokens": ANY,
    "split_statistics[].supervised_tokens": ANY,
    "split_statistics[].num_dropped": ANY,
    "split_statistics[].num_truncated": ANY,
    "split_statistics[].num_unsupervised": ANY,
    "split_statistics[].num_records": ANY,
    "split_statistics[].num_refused": ANY,
    "split_statistics[].num_without_row": ANY,
    "split_statistics[].roles": count(MAX_ROLES, "roles"),
    "split_statistics[].roles[].role": (REQUIRED, TEXT),
    "split_statistics[].roles[].tokens": ANY,
    "split_statistics[].roles[].supervised_tokens": ANY,
    "split_statistics[].roles[].num_truncated": ANY,
    "split_statistics[].num_units": ANY,
    "split_statistics[].longest_unit_tokens": ANY,
    "unsupervised_records": count(MAX_UNSUPERVISED, "records"),
    "unsupervised_records[].record_id": demanded(DIGEST),
    "unsupervised_records[].filename": (REQUIRED, TEXT),
    "unsupervised_records[].line": ANY,
    "unsupervised_records[].message": TEXT,
    **WARNINGS,
    "digest": demanded(DIGEST),
    "tokenizer": REQUIRED,
    **under("tokenizer", FILE),
    **ERRORS,
    "num_errors": ANY,
    "findings": count(len(RenderingFinding.Kind.keys()) - 1, "findings"),
    "findings[].kind": named(RenderingFinding.Kind.DESCRIPTOR),
    "findings[].num_records": ANY,
    "findings[].records": count(MAX_FINDING_RECORDS, "records"),
    "findings[].records[].filename": (REQUIRED, TEXT),
    "findings[].records[].line": ANY,
    "findings[].records[].message": TEXT,
    # A model's own template may be longer than one that is given, and the date is written into it.
    "effective_chat_template": characters(1 << 21),
    "prefix_token_ids": TOKEN_IDS,
    "stop_token_ids": TOKEN_IDS,
}
"""What a worker may say of a rendering that it made, or could not make."""

State = Rendering.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (
        State.STATE_RENDERING,
        State.STATE_CANCELLING,
        State.STATE_FAILED,
        State.STATE_CANCELLED,
    ),
    State.STATE_RENDERING: (
        State.STATE_READY,
        State.STATE_FAILED,
        State.STATE_QUEUED,
        State.STATE_CANCELLING,
        State.STATE_CANCELLED,
    ),
    State.STATE_CANCELLING: (State.STATE_CANCELLED, State.STATE_READY, State.STATE_FAILED),
    State.STATE_READY: (),
    State.STATE_FAILED: (),
    State.STATE_CANCELLED: (),
}


def check_rendering(rendering: Rendering) -> None:
    """Raise InvalidArgument that names every field of a new rendering that is not valid by itself."""
    refuse(
        [
            *limit_violations(rendering, LIMITS, "rendering"),
            *label_violations(rendering.labels, "rendering.labels"),
            *_kind_violations(rendering),
        ]
    )


def resolved(rendering: Rendering, model: Model, today: date) -> Rendering:
    """Return a new rendering with every default filled in, QUEUED; what the model says now is frozen.

    Raises InvalidArgument for a model that is an adapter, or a length beyond it; FailedPrecondition WRONG_STATE for
    a base model that is not READY.
    """
    _require_renderable(model)
    filled = Rendering()
    filled.CopyFrom(rendering)
    filled.state = State.STATE_QUEUED
    filled.max_tokens = _max_tokens(rendering.max_tokens, model)
    filled.kind = rendering.kind or RENDERING_KIND_SUPERVISED
    filled.length_policy = rendering.length_policy or LENGTH_POLICY_DROP
    filled.template_error_policy = rendering.template_error_policy or TEMPLATE_ERROR_POLICY_STRICT
    filled.tokenizer_digest = model.tokenizer_digest
    filled.template_date = today.isoformat()
    return filled


def rendered(rendering: Rendering, result: RenderResult) -> Rendering:
    """Return a rendering with its content. Raises InvalidArgument for a result that contradicts itself."""
    check_contiguous(result.shards)
    filled = Rendering()
    filled.CopyFrom(rendering)
    filled.split_statistics.extend(result.split_statistics)
    filled.unsupervised_records.extend(result.unsupervised_records)
    filled.warnings.extend(result.warnings)
    filled.digest = result.digest
    filled.num_errors = result.num_errors
    filled.findings.extend(result.findings)
    filled.effective_chat_template = result.effective_chat_template
    filled.prefix_token_ids.extend(result.prefix_token_ids)
    filled.stop_token_ids.extend(result.stop_token_ids)
    return filled


def _kind_violations(rendering: Rendering) -> Iterator[FieldViolation]:
    """Yield what does not go with the rendering's kind."""
    if rendering.kind in (RENDERING_KIND_UNSPECIFIED, RENDERING_KIND_SUPERVISED):
        return
    kind = RenderingKind.Name(rendering.kind).removeprefix("RENDERING_KIND_")
    if rendering.mask_mode:
        mode = MaskMode.Name(rendering.mask_mode).removeprefix("MASK_MODE_")
        learnt = "nothing is learnt" if rendering.kind == RENDERING_KIND_PROMPT else "the answer is learnt"
        description = f"must be unset where kind is {kind}, in which {learnt}, got {mode}"
        yield FieldViolation(field="rendering.mask_mode", description=description)
    if rendering.split_turns:
        description = (
            f"must be false where kind is {kind}, in which a record has one answer or asks once, got true"
        )
        yield FieldViolation(field="rendering.split_turns", description=description)
    if rendering.kind == RENDERING_KIND_PROMPT and rendering.length_policy == LENGTH_POLICY_TRUNCATE:
        description = (
            "must be DROP or FAIL where kind is PROMPT, as a prompt that is cut asks nothing, got TRUNCATE"
        )
        yield FieldViolation(field="rendering.length_policy", description=description)


_UNRENDERABLE = {
    Model.KIND_ADAPTER: "adapter",
    Model.KIND_REWARD: "reward model",
    Model.KIND_EXPORT: "export",
}
"""Kinds of models that records are not rendered for, in words."""


def _require_renderable(model: Model) -> None:
    kind = _UNRENDERABLE.get(model.kind)
    if kind is not None:
        base = f"; its base model is {model.base_model}" if model.base_model else ""
        description = f"must be a base model, got the {kind} {model.name}{base}"
        raise InvalidArgument.of_fields(FieldViolation(field="rendering.model", description=description))
    if model.state != Model.STATE_READY:
        state = Model.State.Name(model.state).removeprefix("STATE_")
        raise FailedPrecondition(
            f"{model.name} must be READY, it is {state}",
            reason=Reason.WRONG_STATE,
            metadata={"name": model.name, "state": state},
        )


def _max_tokens(max_tokens: int, model: Model) -> int:
    if max_tokens == 0 and model.context_length == 0:
        description = f"must be set because {model.name} does not say its context length, got 0"
        raise InvalidArgument.of_fields(FieldViolation(field="rendering.max_tokens", description=description))
    if model.context_length and max_tokens > model.context_length:
        description = (
            f"must be in 1..{model.context_length}, the context length of {model.name}, got {max_tokens}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="rendering.max_tokens", description=description))
    return max_tokens or model.context_length
