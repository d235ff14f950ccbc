"""Datasets, versions, records and their tasks between the wire and values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from luthier.data.convert import (
    enum_from_proto,
    set_time,
    shard_from_proto,
    shard_to_proto,
    split_from_proto,
    split_to_proto,
)
from luthier.data.datasets.domain import (
    Dataset,
    DatasetFormat,
    DatasetStatistics,
    DatasetVersion,
    InvalidRecordPolicy,
    NewVersion,
    RecordError,
    Source,
    SplitStatistics,
    VersionOutcome,
)
from luthier.data.splits import Split, SplitSettings
from luthier.v1 import chat_pb2, dataset_pb2
from luthier.work.convert import failure_to_status
from luthier.worker.v1 import task_pb2


def dataset_to_proto(dataset: Dataset) -> dataset_pb2.Dataset:
    """Write a dataset."""
    message = dataset_pb2.Dataset(
        name=dataset.name,
        uid=dataset.uid,
        display_name=dataset.display_name,
        labels=dataset.labels,
        etag=f'"{dataset.revision}"',
    )
    set_time(message.create_time, dataset.create_time)
    set_time(message.update_time, dataset.update_time)
    return message


def new_version(message: dataset_pb2.DatasetVersion) -> NewVersion:
    """Read what a caller asks for. Raises InvalidArgument for an unknown enum number."""
    return NewVersion(
        sources=tuple(_source(source, index) for index, source in enumerate(message.sources)),
        invalid_record_policy=policy_from_proto(
            message.invalid_record_policy, "dataset_version.invalid_record_policy"
        ),
        split_settings=settings_from_proto(message.split_settings),
        labels=dict(message.labels),
    )


def policy_from_proto(number: int, field: str) -> InvalidRecordPolicy:
    """Return a policy, STRICT for unset. Raises InvalidArgument for an unknown number."""
    wire = dataset_pb2.InvalidRecordPolicy
    found = enum_from_proto(InvalidRecordPolicy, wire, "INVALID_RECORD_POLICY_", number, field)
    return found or InvalidRecordPolicy.STRICT


def settings_from_proto(message: dataset_pb2.SplitSettings) -> SplitSettings:
    """Read how records are split."""
    return SplitSettings(
        validation_fraction=message.validation_fraction,
        test_fraction=message.test_fraction,
        seed=message.seed,
    )


def _source(message: dataset_pb2.DatasetSource, index: int) -> Source:
    path = f"dataset_version.sources[{index}]"
    return Source(
        upload=message.upload,
        split=split_from_proto(message.split, f"{path}.split"),
        format=format_from_proto(message.format, f"{path}.format"),
    )


def format_from_proto(number: int, field: str) -> DatasetFormat | None:
    """Return a format, None for unset. Raises InvalidArgument for an unknown number."""
    return enum_from_proto(DatasetFormat, dataset_pb2.DatasetFormat, "DATASET_FORMAT_", number, field)


def format_to_proto(found: DatasetFormat | None) -> dataset_pb2.DatasetFormat.ValueType:
    """Return a format's enum number, 0 for None."""
    return dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{found or 'UNSPECIFIED'}")


def _policy_to_proto(policy: InvalidRecordPolicy) -> dataset_pb2.InvalidRecordPolicy.ValueType:
    return dataset_pb2.InvalidRecordPolicy.Value(f"INVALID_RECORD_POLICY_{policy}")


def _settings_to_proto(settings: SplitSettings) -> dataset_pb2.SplitSettings:
    return dataset_pb2.SplitSettings(
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )


def version_to_proto(version: DatasetVersion) -> dataset_pb2.DatasetVersion:
    """Write a version."""
    message = dataset_pb2.DatasetVersion(
        name=version.name,
        uid=version.uid,
        state=dataset_pb2.DatasetVersion.State.Value(f"STATE_{version.state}"),
        sources=[
            dataset_pb2.DatasetSource(
                upload=source.upload,
                split=split_to_proto(source.split),
                format=format_to_proto(source.format),
                filename=source.filename,
                detected_format=format_to_proto(source.detected_format),
            )
            for source in version.sources
        ],
        invalid_record_policy=_policy_to_proto(version.invalid_record_policy),
        split_settings=_settings_to_proto(version.split_settings),
        digest=version.digest,
        labels=version.labels,
        etag=f'"{version.revision}"',
    )
    if version.statistics is not None:
        message.statistics.CopyFrom(_statistics_to_proto(version.statistics))
    if version.failure is not None:
        message.error.CopyFrom(failure_to_status(version.failure))
    set_time(message.create_time, version.create_time)
    set_time(message.update_time, version.update_time)
    return message


def _statistics_to_proto(statistics: DatasetStatistics) -> dataset_pb2.DatasetStatistics:
    return dataset_pb2.DatasetStatistics(
        splits=[
            dataset_pb2.SplitStatistics(
                split=split_to_proto(split.split),
                num_records=split.num_records,
                num_characters=split.num_characters,
                num_messages=split.num_messages,
            )
            for split in statistics.splits
        ],
        num_records=statistics.num_records,
        num_records_read=statistics.num_records_read,
        num_duplicates=statistics.num_duplicates,
        num_invalid=statistics.num_invalid,
    )


def _statistics_from_proto(message: dataset_pb2.DatasetStatistics) -> DatasetStatistics:
    return DatasetStatistics(
        splits=tuple(
            SplitStatistics(
                split=split_from_proto(split.split) or Split.TRAIN,
                num_records=split.num_records,
                num_characters=split.num_characters,
                num_messages=split.num_messages,
            )
            for split in message.splits
        ),
        num_records=message.num_records,
        num_records_read=message.num_records_read,
        num_duplicates=message.num_duplicates,
        num_invalid=message.num_invalid,
    )


def error_to_proto(error: RecordError) -> dataset_pb2.RecordError:
    """Write what is wrong with a record."""
    return dataset_pb2.RecordError(
        filename=error.filename,
        line=error.line,
        path=error.path,
        reason=error.reason,
        message=error.message,
        value=error.value,
    )


def _error_from_proto(message: dataset_pb2.RecordError) -> RecordError:
    return RecordError(
        filename=message.filename,
        line=message.line,
        path=message.path,
        reason=message.reason,
        message=message.message,
        value=message.value,
    )


def build_spec(version: DatasetVersion) -> task_pb2.Task:
    """Write what a worker needs to build a version."""
    sources = [
        task_pb2.VersionSource(
            filename=source.filename,
            file=task_pb2.BlobFile(path=source.filename, sha256=source.digest, size_bytes=source.size_bytes),
            split=split_to_proto(source.split),
            format=format_to_proto(source.format),
        )
        for source in version.sources
    ]
    spec = task_pb2.BuildVersionSpec(
        sources=sources,
        invalid_record_policy=_policy_to_proto(version.invalid_record_policy),
        split_settings=_settings_to_proto(version.split_settings),
    )
    return task_pb2.Task(build_version=spec)


def outcome_from_proto(message: task_pb2.BuildVersionResult) -> VersionOutcome:
    """Read what a worker brings of a version."""
    return VersionOutcome(
        shards=tuple(shard_from_proto(shard) for shard in message.shards),
        statistics=_statistics_from_proto(message.statistics),
        digest=message.digest,
        formats=tuple(format_from_proto(number, "formats") for number in message.formats),
        errors=tuple(_error_from_proto(error) for error in message.errors),
    )


def outcome_to_proto(outcome: VersionOutcome) -> task_pb2.TaskResult:
    """Write what a worker brings of a version."""
    result = task_pb2.BuildVersionResult(
        shards=[shard_to_proto(shard) for shard in outcome.shards],
        statistics=_statistics_to_proto(outcome.statistics),
        digest=outcome.digest,
        errors=[error_to_proto(error) for error in outcome.errors],
        formats=[format_to_proto(found) for found in outcome.formats],
    )
    return task_pb2.TaskResult(build_version=result)


def record_to_proto(row: Mapping[str, Any]) -> dataset_pb2.Record:
    """Write a stored record."""
    message = dataset_pb2.Record(
        row=row["row"],
        record_id=row["record_id"],
        split=split_to_proto(Split(row["split"])),
        filename=row["filename"],
        line=row["line"],
    )
    example = json.loads(row["record"])
    if "messages" in example:
        message.conversation.CopyFrom(_conversation_to_proto(example))
    else:
        message.prompt_completion.prompt = example["prompt"]
        message.prompt_completion.completion = example["completion"]
    return message


def _conversation_to_proto(example: Mapping[str, Any]) -> chat_pb2.Conversation:
    tools = example.get("tools")
    return chat_pb2.Conversation(
        messages=[_message_to_proto(message) for message in example["messages"]],
        tools_json=json.dumps(tools, ensure_ascii=False) if tools else "",
    )


def _message_to_proto(message: Mapping[str, Any]) -> chat_pb2.ChatMessage:
    calls = message.get("tool_calls")
    return chat_pb2.ChatMessage(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("name") or "",
        weight=message.get("weight"),
        tool_calls_json=json.dumps(calls, ensure_ascii=False) if calls else "",
        tool_call_id=message.get("tool_call_id") or "",
    )
