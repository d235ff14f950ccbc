"""What datasets and their versions may be: defaults, limits, and which state follows which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from luthier.data.result_limits import ERRORS, MAX_SHARDS, SHARDS
from luthier.data.shards import check_contiguous, num_rows
from luthier.errors import FieldViolation, InvalidArgument
from luthier.runtime.field_limits import (
    ANY,
    DIGEST,
    REQUIRED,
    SHARE,
    LimitTable,
    count,
    demanded,
    limit_violations,
    named,
    refuse,
    required,
)
from luthier.runtime.labels import DISPLAY_NAME, label_violations
from luthier.runtime.result_limits import WARNINGS
from luthier.v1.dataset_pb2 import (
    INVALID_RECORD_POLICY_STRICT,
    Dataset,
    DatasetSource,
    DatasetVersion,
    Split,
    SplitSettings,
)
from luthier.worker.v1.task_pb2 import BuildVersionResult

MAX_SOURCES = 1000

DATASET_LIMITS: LimitTable = {"display_name": DISPLAY_NAME}
VERSION_LIMITS: LimitTable = {
    "sources": count(MAX_SOURCES, "sources", least=1),
    "sources[].upload": required("must name an upload"),
    "split_settings.validation_fraction": SHARE,
    "split_settings.test_fraction": SHARE,
}
RESULT_LIMITS: LimitTable = {
    **SHARDS,
    "shards": count(MAX_SHARDS, "shards", least=1),
    "statistics": REQUIRED,
    "statistics.splits": count(len(Split.keys()) - 1, "splits"),
    "statistics.splits[].split": named(Split.DESCRIPTOR),
    "statistics.splits[].num_records": ANY,
    "statistics.splits[].num_characters": ANY,
    "statistics.splits[].num_messages": ANY,
    "statistics.num_records": ANY,
    "statistics.num_records_read": ANY,
    "statistics.num_duplicates": ANY,
    "statistics.num_invalid": ANY,
    "digest": demanded(DIGEST),
    **ERRORS,
    # No format is that of a source of which no line could be read.
    "formats": count(MAX_SOURCES, "formats"),
    **WARNINGS,
}
"""What a worker may say of a version that it built, or could not build."""

State = DatasetVersion.State
TRANSITIONS: Mapping[int, Sequence[int]] = {
    State.STATE_QUEUED: (
        State.STATE_BUILDING,
        State.STATE_CANCELLING,
        State.STATE_FAILED,
        State.STATE_CANCELLED,
    ),
    State.STATE_BUILDING: (
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


def check_dataset(dataset: Dataset) -> None:
    """Raise InvalidArgument that names every field of a new dataset that is not valid."""
    refuse(
        [
            *limit_violations(dataset, DATASET_LIMITS, "dataset"),
            *label_violations(dataset.labels, "dataset.labels"),
        ]
    )


def check_version(version: DatasetVersion) -> None:
    """Raise InvalidArgument that names every field of a new version that is not valid by itself."""
    refuse(
        [
            *limit_violations(version, VERSION_LIMITS, "dataset_version"),
            *_repeated_uploads(version.sources),
            *_shares_violations(version.split_settings),
            *label_violations(version.labels, "dataset_version.labels"),
        ]
    )


def resolved(version: DatasetVersion) -> DatasetVersion:
    """Return a new version with every default filled in, QUEUED."""
    filled = DatasetVersion()
    filled.CopyFrom(version)
    filled.state = State.STATE_QUEUED
    filled.invalid_record_policy = version.invalid_record_policy or INVALID_RECORD_POLICY_STRICT
    filled.split_settings.SetInParent()
    return filled


def with_findings(version: DatasetVersion, result: BuildVersionResult) -> DatasetVersion:
    """Return a version with what a worker found out about its sources, whether it was built or not."""
    filled = DatasetVersion()
    filled.CopyFrom(version)
    filled.statistics.CopyFrom(result.statistics)
    for source, found in zip(filled.sources, result.formats, strict=False):
        source.detected_format = found
    filled.warnings.extend(result.warnings)
    return filled


def built(version: DatasetVersion, result: BuildVersionResult) -> DatasetVersion:
    """Return a version with its content. Raises InvalidArgument for a result that contradicts itself."""
    check_contiguous(result.shards)
    rows = num_rows(result.shards)
    if rows != result.statistics.num_records:
        description = f"must be {rows}, as many as the shards hold, got {result.statistics.num_records}"
        raise InvalidArgument.of_fields(
            FieldViolation(field="statistics.num_records", description=description)
        )
    if len(result.formats) != len(version.sources):
        description = (
            f"must name {len(version.sources)} formats, one for each source, got {len(result.formats)}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="formats", description=description))
    filled = with_findings(version, result)
    filled.digest = result.digest
    return filled


def _repeated_uploads(sources: Sequence[DatasetSource]) -> Iterator[FieldViolation]:
    first_use: dict[str, int] = {}
    for index, source in enumerate(sources):
        first = first_use.setdefault(source.upload, index)
        if source.upload and first != index:
            description = f"must be named once, got {source.upload} also as sources[{first}]"
            yield FieldViolation(field=f"dataset_version.sources[{index}].upload", description=description)


def _shares_violations(settings: SplitSettings) -> Iterator[FieldViolation]:
    shares = (settings.validation_fraction, settings.test_fraction)
    # Where one alone is beyond its limit, that one is named.
    if all(map(SHARE.allows, shares)) and sum(shares) >= 1.0:
        description = (
            "validation_fraction and test_fraction together must be below 1, "
            f"got {settings.validation_fraction:g} + {settings.test_fraction:g}"
        )
        yield FieldViolation(field="dataset_version.split_settings", description=description)
