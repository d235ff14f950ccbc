"""What datasets and their versions may be: defaults, limits, and which state follows which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from luthier.data.shards import check_contiguous
from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.labels import display_name_violations, label_violations
from luthier.v1.dataset_pb2 import (
    INVALID_RECORD_POLICY_STRICT,
    Dataset,
    DatasetSource,
    DatasetVersion,
    SplitSettings,
)
from luthier.worker.v1.task_pb2 import BuildVersionResult

MAX_SOURCES = 1000
MAX_ERRORS = 1000
"""Bad records of a version that are kept; all are counted."""

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
    _refuse(
        [
            *display_name_violations(dataset.display_name, "dataset.display_name"),
            *label_violations(dataset.labels, "dataset.labels"),
        ]
    )


def check_version(version: DatasetVersion) -> None:
    """Raise InvalidArgument that names every field of a new version that is not valid by itself."""
    _refuse(
        [
            *_source_violations(version.sources),
            *_settings_violations(version.split_settings),
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
    return filled


def built(version: DatasetVersion, result: BuildVersionResult) -> DatasetVersion:
    """Return a version with its content. Raises InvalidArgument for a result that contradicts itself."""
    check_contiguous(result.shards)
    if len(result.formats) != len(version.sources):
        description = (
            f"must name {len(version.sources)} formats, one for each source, got {len(result.formats)}"
        )
        raise InvalidArgument.of_fields(FieldViolation(field="formats", description=description))
    filled = with_findings(version, result)
    filled.digest = result.digest
    return filled


def _refuse(violations: Sequence[FieldViolation]) -> None:
    if violations:
        raise InvalidArgument.of_fields(*violations)


def _source_violations(sources: Sequence[DatasetSource]) -> Iterator[FieldViolation]:
    path = "dataset_version.sources"
    if not sources:
        description = "must name at least one upload, got none"
        yield FieldViolation(field=path, description=description, reason=Reason.FIELD_REQUIRED)
    if len(sources) > MAX_SOURCES:
        yield FieldViolation(field=path, description=f"must be at most {MAX_SOURCES}, got {len(sources)}")
    first_use: dict[str, int] = {}
    for index, source in enumerate(sources):
        if not source.upload:
            description = "must name an upload, got nothing"
            yield FieldViolation(
                field=f"{path}[{index}].upload", description=description, reason=Reason.FIELD_REQUIRED
            )
        elif first_use.setdefault(source.upload, index) != index:
            description = (
                f"must be named once, got {source.upload} also as sources[{first_use[source.upload]}]"
            )
            yield FieldViolation(field=f"{path}[{index}].upload", description=description)


def _settings_violations(settings: SplitSettings) -> Iterator[FieldViolation]:
    path = "dataset_version.split_settings"
    shares = {
        "validation_fraction": settings.validation_fraction,
        "test_fraction": settings.test_fraction,
    }
    # Written so that NaN is refused as well.
    wrong = {name: share for name, share in shares.items() if not 0.0 <= share < 1.0}
    for name, share in wrong.items():
        yield FieldViolation(field=f"{path}.{name}", description=f"must be in [0, 1), got {share:g}")
    if not wrong and sum(shares.values()) >= 1.0:
        description = (
            "validation_fraction and test_fraction together must be below 1, "
            f"got {settings.validation_fraction:g} + {settings.test_fraction:g}"
        )
        yield FieldViolation(field=path, description=description)
