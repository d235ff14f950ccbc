"""Datasets and their versions as values, with the rules that they obey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from luthier.data.shards import Shard, check_contiguous
from luthier.data.splits import Split, SplitSettings
from luthier.errors import FailedPrecondition, Failure, FieldViolation, InvalidArgument, Reason

MAX_SOURCES = 1000
MAX_ERRORS = 1000
"""Bad records of a version that are kept; all are counted."""


class DatasetState(StrEnum):
    """Where a dataset stands."""

    ACTIVE = "ACTIVE"


class VersionState(StrEnum):
    """Where a version stands. READY, FAILED and CANCELLED are final."""

    QUEUED = "QUEUED"
    BUILDING = "BUILDING"
    READY = "READY"
    FAILED = "FAILED"
    CANCELLING = "CANCELLING"
    CANCELLED = "CANCELLED"


class DatasetFormat(StrEnum):
    """Shape of the records in a source."""

    OPENAI_CHAT = "OPENAI_CHAT"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"
    ALPACA = "ALPACA"


class InvalidRecordPolicy(StrEnum):
    """What a bad record does: fail its version, or be left out and reported."""

    STRICT = "STRICT"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A body of examples; its versions hold the records."""

    name: str
    uid: str
    state: DatasetState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    display_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a version.

    `digest` and `size_bytes` are the upload's blob. `split` None: the hash of each record decides. `format`
    None: detected; `detected_format` is what was used, None until the version is built.
    """

    upload: str
    split: Split | None = None
    format: DatasetFormat | None = None
    filename: str = ""
    digest: str = ""
    size_bytes: int = 0
    detected_format: DatasetFormat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStatistics:
    """Counts of one split."""

    split: Split
    num_records: int = 0
    num_characters: int = 0
    num_messages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatistics:
    """Counts of a version: read = kept + duplicates + invalid."""

    splits: tuple[SplitStatistics, ...] = ()
    num_records: int = 0
    num_records_read: int = 0
    num_duplicates: int = 0
    num_invalid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordError:
    """What is wrong with one record: where it stands, the path into it, a reason, a sentence, the value."""

    filename: str
    line: int
    path: str
    reason: str
    message: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """What a caller asks for."""

    sources: tuple[Source, ...]
    invalid_record_policy: InvalidRecordPolicy
    split_settings: SplitSettings
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionOutcome:
    """What a worker brings of a version; `errors` are the first `MAX_ERRORS` bad records."""

    shards: tuple[Shard, ...]
    statistics: DatasetStatistics
    digest: str
    formats: tuple[DatasetFormat | None, ...]
    errors: tuple[RecordError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetVersion:
    """An immutable body of records. `failure` is set when FAILED, `digest` and `shards` when READY."""

    name: str
    uid: str
    state: VersionState
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    revision: int
    sources: tuple[Source, ...]
    invalid_record_policy: InvalidRecordPolicy = InvalidRecordPolicy.STRICT
    split_settings: SplitSettings = field(default_factory=SplitSettings)
    statistics: DatasetStatistics | None = None
    digest: str = ""
    shards: tuple[Shard, ...] = ()
    failure: Failure | None = None

    @property
    def final(self) -> bool:
        """Whether the version never changes again."""
        return self.state in (VersionState.READY, VersionState.FAILED, VersionState.CANCELLED)

    def building(self) -> DatasetVersion:
        """Return the version once a worker has begun. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=VersionState.BUILDING)

    def queued_again(self) -> DatasetVersion:
        """Return the version once its worker was lost. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=VersionState.QUEUED)

    def cancelling(self) -> DatasetVersion:
        """Return the version once it was asked to stop. Raises FailedPrecondition when final or stopping."""
        self._refuse_ending()
        return replace(self, state=VersionState.CANCELLING)

    def cancelled(self) -> DatasetVersion:
        """Return the version once it has stopped on request. Raises FailedPrecondition when it is final."""
        self._refuse_final()
        return replace(self, state=VersionState.CANCELLED)

    def built(self, outcome: VersionOutcome) -> DatasetVersion:
        """Return the READY version. Raises FailedPrecondition, and InvalidArgument for a bad outcome."""
        self._refuse_final()
        check_contiguous(outcome.shards)
        if len(outcome.formats) != len(self.sources):
            description = (
                f"must name {len(self.sources)} formats, one for each source, got {len(outcome.formats)}"
            )
            raise InvalidArgument.of_fields(FieldViolation(field="formats", description=description))
        return replace(
            self,
            state=VersionState.READY,
            sources=_detected(self.sources, outcome.formats),
            statistics=outcome.statistics,
            digest=outcome.digest,
            shards=outcome.shards,
        )

    def failed(self, failure: Failure, outcome: VersionOutcome | None) -> DatasetVersion:
        """Return the FAILED version with what is known all the same. Raises FailedPrecondition when final."""
        self._refuse_final()
        changed = replace(self, state=VersionState.FAILED, failure=failure)
        if outcome is None:
            return changed
        return replace(
            changed, sources=_detected(self.sources, outcome.formats), statistics=outcome.statistics
        )

    def require_ready(self) -> DatasetVersion:
        """Return the version. Raises FailedPrecondition WRONG_STATE unless it is READY."""
        if self.state is VersionState.READY:
            return self
        why = f": {self.failure.message}" if self.failure is not None else ""
        raise FailedPrecondition(
            f"{self.name} must be READY, it is {self.state}{why}",
            reason=Reason.WRONG_STATE,
            metadata={"name": self.name, "state": self.state},
        )

    def _refuse_ending(self) -> None:
        self._refuse_final()
        if self.state is VersionState.CANCELLING:
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


def _detected(sources: Sequence[Source], formats: Sequence[DatasetFormat | None]) -> tuple[Source, ...]:
    known = [*formats, *[None] * (len(sources) - len(formats))]
    return tuple(
        replace(source, detected_format=found) for source, found in zip(sources, known, strict=False)
    )


def version_violations(wanted: NewVersion) -> Iterator[FieldViolation]:
    """Yield what is wrong with a new version by itself, its labels aside."""
    yield from _source_violations(wanted.sources)
    yield from _settings_violations(wanted.split_settings)


def _source_violations(sources: Sequence[Source]) -> Iterator[FieldViolation]:
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
