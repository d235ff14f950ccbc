"""Renderings, their rows and their tasks between the wire and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.data.convert import (
    enum_from_proto,
    set_time,
    shard_from_proto,
    shard_to_proto,
    split_from_proto,
    split_to_proto,
)
from luthier.data.renderings.domain import (
    FindingKind,
    FindingRecord,
    LengthPolicy,
    LengthStatistics,
    MaskMode,
    NewRendering,
    ReadyVersion,
    RefusedRecord,
    Rendering,
    RenderingFinding,
    RenderingOutcome,
    RenderingSplitStatistics,
    TemplateErrorPolicy,
    UnsupervisedRecord,
)
from luthier.data.splits import Split
from luthier.errors import InvalidArgument
from luthier.v1 import dataset_pb2, rendering_pb2
from luthier.work.convert import failure_to_status
from luthier.worker.v1 import task_pb2


def new_rendering(message: rendering_pb2.Rendering) -> NewRendering:
    """Read what a caller asks for. Raises InvalidArgument for an unknown enum number."""
    return NewRendering(
        dataset_version=message.dataset_version,
        model=message.model,
        chat_template=message.chat_template,
        mask_mode=mask_mode_from_proto(message.mask_mode, "rendering.mask_mode"),
        max_tokens=message.max_tokens,
        length_policy=length_policy_from_proto(message.length_policy, "rendering.length_policy"),
        labels=dict(message.labels),
        split_turns=message.split_turns,
        template_error_policy=error_policy_from_proto(
            message.template_error_policy, "rendering.template_error_policy"
        ),
    )


def mask_mode_from_proto(number: int, field: str) -> MaskMode:
    """Return a mask mode, DEFAULT for unset. Raises InvalidArgument for an unknown number."""
    found = enum_from_proto(MaskMode, rendering_pb2.MaskMode, "MASK_MODE_", number, field)
    return found or MaskMode.DEFAULT


def length_policy_from_proto(number: int, field: str) -> LengthPolicy:
    """Return a length policy, DROP for unset. Raises InvalidArgument for an unknown number."""
    found = enum_from_proto(LengthPolicy, rendering_pb2.LengthPolicy, "LENGTH_POLICY_", number, field)
    return found or LengthPolicy.DROP


def error_policy_from_proto(number: int, field: str) -> TemplateErrorPolicy:
    """Return a policy for template errors, STRICT for unset. Raises InvalidArgument for an unknown number."""
    wire, prefix = rendering_pb2.TemplateErrorPolicy, "TEMPLATE_ERROR_POLICY_"
    return enum_from_proto(TemplateErrorPolicy, wire, prefix, number, field) or TemplateErrorPolicy.STRICT


def _error_policy_to_proto(policy: TemplateErrorPolicy) -> rendering_pb2.TemplateErrorPolicy.ValueType:
    return rendering_pb2.TemplateErrorPolicy.Value(f"TEMPLATE_ERROR_POLICY_{policy}")


def _mask_mode_to_proto(mode: MaskMode) -> rendering_pb2.MaskMode.ValueType:
    name = "UNSPECIFIED" if mode is MaskMode.DEFAULT else mode.value
    return rendering_pb2.MaskMode.Value(f"MASK_MODE_{name}")


def _length_policy_to_proto(policy: LengthPolicy) -> rendering_pb2.LengthPolicy.ValueType:
    return rendering_pb2.LengthPolicy.Value(f"LENGTH_POLICY_{policy}")


def rendering_to_proto(rendering: Rendering) -> rendering_pb2.Rendering:
    """Write a rendering."""
    message = rendering_pb2.Rendering(
        name=rendering.name,
        uid=rendering.uid,
        state=rendering_pb2.Rendering.State.Value(f"STATE_{rendering.state}"),
        dataset_version=rendering.dataset_version,
        model=rendering.model,
        chat_template=rendering.chat_template,
        mask_mode=_mask_mode_to_proto(rendering.mask_mode),
        max_tokens=rendering.max_tokens,
        length_policy=_length_policy_to_proto(rendering.length_policy),
        tokenizer_digest=rendering.tokenizer_digest,
        template_date=rendering.template_date,
        split_statistics=[_split_statistics_to_proto(split) for split in rendering.split_statistics],
        unsupervised_records=[_unsupervised_to_proto(record) for record in rendering.unsupervised_records],
        warnings=rendering.warnings,
        digest=rendering.digest,
        labels=rendering.labels,
        effective_chat_template=rendering.effective_template,
        prefix_token_ids=rendering.prefix_token_ids,
        stop_token_ids=rendering.stop_token_ids,
        etag=f'"{rendering.revision}"',
        split_turns=rendering.split_turns,
        template_error_policy=_error_policy_to_proto(rendering.template_error_policy),
        num_errors=rendering.num_errors,
        findings=[_finding_to_proto(finding) for finding in rendering.findings],
    )
    if rendering.failure is not None:
        message.error.CopyFrom(failure_to_status(rendering.failure))
    set_time(message.create_time, rendering.create_time)
    set_time(message.update_time, rendering.update_time)
    return message


def _split_statistics_to_proto(
    statistics: RenderingSplitStatistics,
) -> rendering_pb2.RenderingSplitStatistics:
    return rendering_pb2.RenderingSplitStatistics(
        split=split_to_proto(statistics.split),
        tokens=_lengths_to_proto(statistics.tokens),
        supervised_tokens=_lengths_to_proto(statistics.supervised_tokens),
        num_dropped=statistics.num_dropped,
        num_truncated=statistics.num_truncated,
        num_unsupervised=statistics.num_unsupervised,
        num_without_row=statistics.num_without_row,
        num_records=statistics.num_records,
        num_refused=statistics.num_refused,
    )


def _lengths_to_proto(lengths: LengthStatistics) -> rendering_pb2.LengthStatistics:
    return rendering_pb2.LengthStatistics(
        count=lengths.count,
        sum=lengths.sum,
        minimum=lengths.minimum,
        maximum=lengths.maximum,
        mean=lengths.mean,
        p5=lengths.p5,
        p50=lengths.p50,
        p95=lengths.p95,
    )


def _lengths_from_proto(message: rendering_pb2.LengthStatistics) -> LengthStatistics:
    return LengthStatistics(
        count=message.count,
        sum=message.sum,
        minimum=message.minimum,
        maximum=message.maximum,
        mean=message.mean,
        p5=message.p5,
        p50=message.p50,
        p95=message.p95,
    )


def render_spec(rendering: Rendering, version: ReadyVersion) -> task_pb2.Task:
    """Write what a worker needs to render."""
    spec = task_pb2.RenderSpec(
        shards=[shard_to_proto(shard) for shard in version.shards],
        dataset_digest=version.digest,
        model=task_pb2.ModelReference(name=rendering.model, digest=rendering.model_digest),
        tokenizer_digest=rendering.tokenizer_digest,
        chat_template=rendering.chat_template,
        mask_mode=_mask_mode_to_proto(rendering.mask_mode),
        max_tokens=rendering.max_tokens,
        length_policy=_length_policy_to_proto(rendering.length_policy),
        template_date=rendering.template_date,
        split_turns=rendering.split_turns,
        template_error_policy=_error_policy_to_proto(rendering.template_error_policy),
    )
    return task_pb2.Task(render=spec)


def outcome_from_proto(message: task_pb2.RenderResult) -> RenderingOutcome:
    """Read what a worker brings of a rendering."""
    return RenderingOutcome(
        shards=tuple(shard_from_proto(shard) for shard in message.shards),
        split_statistics=tuple(
            RenderingSplitStatistics(
                split=split_from_proto(split.split) or Split.TRAIN,
                tokens=_lengths_from_proto(split.tokens),
                supervised_tokens=_lengths_from_proto(split.supervised_tokens),
                num_dropped=split.num_dropped,
                num_truncated=split.num_truncated,
                num_unsupervised=split.num_unsupervised,
                num_without_row=split.num_without_row,
                num_records=split.num_records,
                num_refused=split.num_refused,
            )
            for split in message.split_statistics
        ),
        unsupervised_records=tuple(
            UnsupervisedRecord(
                record_id=record.record_id,
                filename=record.filename,
                line=record.line,
                message=record.message,
            )
            for record in message.unsupervised_records
        ),
        warnings=tuple(message.warnings),
        digest=message.digest,
        tokenizer_blob=message.tokenizer.sha256,
        errors=tuple(
            RefusedRecord(
                filename=error.filename, line=error.line, reason=error.reason, message=error.message
            )
            for error in message.errors
        ),
        num_errors=message.num_errors,
        findings=tuple(_finding_from_proto(finding) for finding in message.findings),
        effective_template=message.effective_chat_template,
        prefix_token_ids=tuple(message.prefix_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def outcome_to_proto(
    outcome: RenderingOutcome, tokenizer: task_pb2.BlobFile | None = None
) -> task_pb2.TaskResult:
    """Write what a worker brings of a rendering; one that fails has no tokenizer."""
    result = task_pb2.RenderResult(
        shards=[shard_to_proto(shard) for shard in outcome.shards],
        split_statistics=[_split_statistics_to_proto(split) for split in outcome.split_statistics],
        unsupervised_records=[_unsupervised_to_proto(record) for record in outcome.unsupervised_records],
        warnings=outcome.warnings,
        digest=outcome.digest,
        tokenizer=tokenizer,
        errors=[refused_to_proto(error) for error in outcome.errors],
        num_errors=outcome.num_errors,
        findings=[_finding_to_proto(finding) for finding in outcome.findings],
        effective_chat_template=outcome.effective_template,
        prefix_token_ids=outcome.prefix_token_ids,
        stop_token_ids=outcome.stop_token_ids,
    )
    return task_pb2.TaskResult(render=result)


def refused_to_proto(error: RefusedRecord) -> dataset_pb2.RecordError:
    """Write a record that cannot be rendered."""
    return dataset_pb2.RecordError(
        filename=error.filename, line=error.line, reason=error.reason, message=error.message
    )


def _finding_to_proto(finding: RenderingFinding) -> rendering_pb2.RenderingFinding:
    return rendering_pb2.RenderingFinding(
        kind=rendering_pb2.RenderingFinding.Kind.Value(f"KIND_{finding.kind}"),
        num_records=finding.num_records,
        records=[
            rendering_pb2.RenderingFindingRecord(
                filename=record.filename, line=record.line, message=record.message
            )
            for record in finding.records
        ],
    )


def _finding_from_proto(message: rendering_pb2.RenderingFinding) -> RenderingFinding:
    kind = enum_from_proto(
        FindingKind, rendering_pb2.RenderingFinding.Kind, "KIND_", message.kind, "findings.kind"
    )
    if kind is None:
        raise InvalidArgument("findings.kind must be set, got KIND_UNSPECIFIED")
    return RenderingFinding(
        kind=kind,
        num_records=message.num_records,
        records=tuple(
            FindingRecord(filename=record.filename, line=record.line, message=record.message)
            for record in message.records
        ),
    )


def _unsupervised_to_proto(record: UnsupervisedRecord) -> rendering_pb2.UnsupervisedRecord:
    return rendering_pb2.UnsupervisedRecord(
        record_id=record.record_id, filename=record.filename, line=record.line, message=record.message
    )


def row_to_proto(row: Mapping[str, Any], texts: Sequence[str]) -> rendering_pb2.RenderedRow:
    """Write a stored row with the text of each of its tokens."""
    return rendering_pb2.RenderedRow(
        row=row["row"],
        record_id=row["record_id"],
        split=split_to_proto(Split(row["split"])),
        filename=row["filename"],
        line=row["line"],
        tokens=[
            rendering_pb2.RenderedToken(token_id=token_id, text=text, supervised=supervised)
            for token_id, text, supervised in zip(row["input_ids"], texts, row["loss_mask"], strict=True)
        ],
    )
