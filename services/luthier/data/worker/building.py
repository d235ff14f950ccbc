"""Sources to a version: read, check, make canonical, drop exact duplicates, split, write."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from luthier.data.result_limits import MAX_ERRORS
from luthier.data.splits import SPLITS, split_name
from luthier.data.worker.duplicates import SeenRecords
from luthier.data.worker.parquet import RECORD_SCHEMA, ShardWriter, WrittenShard
from luthier.data.worker.splitting import Place, Splitter
from luthier.errors import InvalidArgument, Reason
from luthier.text import formats
from luthier.text.readers import Line, read_values
from luthier.text.records import (
    ChatPair,
    ChatRecord,
    CompletionPair,
    CompletionRecord,
    Record,
    record_id,
    record_to_json,
)
from luthier.v1.dataset_pb2 import (
    DATASET_FORMAT_UNSPECIFIED,
    INVALID_RECORD_POLICY_SKIP,
    DatasetFormat,
    DatasetStatistics,
    InvalidRecordPolicy,
    RecordError,
    Split,
    SplitSettings,
    SplitStatistics,
)

MAX_RECORD_BYTES = 1 << 20
"""Longest canonical record: it must travel as one message wherever it is read."""
# 2: records are told apart by their text, with keys in the order in which templates write them; ids leave it out.
# 3: the hash that divides records is that of what they ask first.
_DIGEST_VERSION = "luthier-dataset-version-3"
_FORMAT = "DATASET_FORMAT_"
_DETECT_VALUES = 20
_DETECT_LINES = 1000
_MESSAGE_CHARACTERS = 500
# What comes from a record is shown to people: no part of it may steer their terminals.
_WRITTEN_OUT = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A version's content. `errors` are the first `MAX_ERRORS`; the statistics count all of them.

    `unreadable`: where a source broke off, so that how many records it held is not known. `warnings` are for people.
    """

    shards: tuple[WrittenShard, ...]
    statistics: DatasetStatistics
    digest: str
    errors: tuple[RecordError, ...]
    unreadable: RecordError | None
    warnings: tuple[str, ...]


class VersionBuilder:
    """Builds one version in `folder` from one source after another.

    Memory: the largest record, one row group and bounded caches, however great the sources are.

    Args:
        folder: where to write.
        settings: what divides the records of sources without a split.
        tick: called before every record; may raise to end the work.
        fixed_splits: the splits of all sources, unspecified ones among them.
    """

    def __init__(
        self,
        folder: Path,
        settings: SplitSettings,
        tick: Callable[[], None],
        fixed_splits: Iterable[Split.ValueType],
    ) -> None:
        self._tick = tick
        self._splitter = Splitter(settings, folder / "prompts.db" if len(set(fixed_splits)) > 1 else None)
        self._shards: list[WrittenShard] = []
        self._writer = ShardWriter(folder, "records", RECORD_SCHEMA, self._shards.append)
        self._seen = SeenRecords(folder / "seen.db")
        self._splits = {split: SplitStatistics(split=split) for split in SPLITS}
        self._num_read = 0
        self._num_duplicates = 0
        self._num_invalid = 0
        self._errors: list[RecordError] = []
        self._unreadable: RecordError | None = None
        self._digest = hashlib.sha256(_settings_line(settings))

    def read(
        self, stream: BinaryIO, place: Place, format_: DatasetFormat.ValueType
    ) -> DatasetFormat.ValueType:
        """Take in one source; return the format used, unspecified when no line of it could be read.

        Raises InvalidArgument
        EMPTY_FILE for a source without records, UNKNOWN_FORMAT when none fits and none was given.
        """
        lines, found = _detected(read_values(stream), place.filename, format_)
        for line in lines:
            self._tick()
            self._num_read += 1
            self._take(line, place, found)
        if line.final:
            self._unreadable = self._unreadable or _error(place, line, _unreadable(line))
        return found

    def finish(self) -> Built:
        """Close the files and return the version."""
        self._writer.close()
        self._seen.close()
        self._splitter.close()
        return Built(
            shards=tuple(self._shards),
            statistics=DatasetStatistics(
                splits=[counts for counts in self._splits.values() if counts.num_records],
                num_records=self._writer.num_rows,
                num_records_read=self._num_read,
                num_duplicates=self._num_duplicates,
                num_invalid=self._num_invalid,
            ),
            digest=self._digest.hexdigest(),
            errors=tuple(self._errors),
            unreadable=self._unreadable,
            warnings=tuple(self._splitter.warnings()),
        )

    def _take(self, line: Line, place: Place, format_: DatasetFormat.ValueType) -> None:
        try:
            record, canonical = _canonical(line, format_)
        except formats.RecordError as error:
            self._refuse(place, line, error)
            return
        text = canonical.decode()
        name = record_id(record, text)
        if not self._seen.add(name):
            self._num_duplicates += 1
            return
        split = self._splitter.split_of(record, name, place, line.number)
        told = f"{name} {split_name(split)} {hashlib.sha256(canonical).hexdigest()}\n"
        self._digest.update(told.encode())
        self._count(record, split)
        row = {
            "record_id": name,
            "split": split_name(split),
            "filename": place.filename,
            "line": line.number,
            "record": text,
        }
        self._writer.add(row, len(canonical) + 200)

    def _count(self, record: Record, split: Split.ValueType) -> None:
        texts = _texts(record)
        counts = self._splits[split]
        counts.num_records += 1
        counts.num_characters += sum(map(len, texts))
        counts.num_messages += len(texts)

    def _refuse(self, place: Place, line: Line, error: formats.RecordError) -> None:
        self._num_invalid += 1
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(_error(place, line, error))


def require_valid(built: Built, policy: InvalidRecordPolicy.ValueType) -> None:
    """Raise InvalidArgument INVALID_RECORDS that names the first bad record and their number.

    Under STRICT one bad record is enough. Under SKIP a version needs at least one good one, and sources that can
    be read to their end: nobody could say what else is left out.
    """
    counts = built.statistics
    skips = policy == INVALID_RECORD_POLICY_SKIP and counts.num_records > 0
    if not counts.num_invalid or (skips and built.unreadable is None):
        return
    first = built.unreadable if skips and built.unreadable is not None else built.errors[0]
    where = f"{first.filename}:{first.line}"
    what = f"{first.path}: {first.message}" if first.path else first.message
    raise InvalidArgument(
        f"{counts.num_invalid} of {counts.num_records_read} records are not valid, "
        f"the first at {where}: {what}",
        reason=Reason.INVALID_RECORDS,
        metadata={
            "filename": first.filename,
            "line": str(first.line),
            "path": first.path,
            "record_reason": first.reason,
            "num_invalid": str(counts.num_invalid),
            "skippable": str(built.unreadable is None).lower(),
        },
    )


def _error(place: Place, line: Line, error: formats.RecordError) -> RecordError:
    return RecordError(
        filename=place.filename,
        line=line.number,
        path=_printable(error.path),
        reason=error.reason,
        message=_printable(error.message),
        value=_printable(error.value),
    )


def _unreadable(line: Line) -> formats.RecordError:
    message = f"{line.error}; nothing after it can be read"
    return formats.RecordError("", line.reason, message, line.excerpt)


def _settings_line(settings: SplitSettings) -> bytes:
    values = {
        "version": _DIGEST_VERSION,
        "validation_fraction": settings.validation_fraction,
        "test_fraction": settings.test_fraction,
        "seed": settings.seed,
    }
    return json.dumps(values, sort_keys=True).encode() + b"\n"


def _detected(
    lines: Iterator[Line], filename: str, format_: DatasetFormat.ValueType
) -> tuple[Iterator[Line], DatasetFormat.ValueType]:
    """Return all lines again, and the format given or found in the first ones."""
    ahead: list[Line] = []
    values: list[object] = []
    for line in itertools.islice(lines, _DETECT_LINES):
        ahead.append(line)
        values += [] if line.error is not None else [line.value]
        if len(values) == _DETECT_VALUES or format_:
            break
    if not ahead:
        raise InvalidArgument(
            f"{filename} must hold at least one record, it is empty",
            reason=Reason.EMPTY_FILE,
            metadata={"filename": filename},
        )
    if not format_ and values:
        format_ = _detect(values, filename)
    return itertools.chain(ahead, lines), format_


def _detect(values: list[object], filename: str) -> DatasetFormat.ValueType:
    try:
        return DatasetFormat.Value(_FORMAT + formats.detect(values).value)
    except formats.UnknownFormatError as error:
        raise InvalidArgument(
            f"{filename}: {error}", reason=Reason.UNKNOWN_FORMAT, metadata={"filename": filename}
        ) from error


def _canonical(line: Line, format_: DatasetFormat.ValueType) -> tuple[Record, bytes]:
    if line.error is not None or format_ == DATASET_FORMAT_UNSPECIFIED:
        raise formats.RecordError("", line.reason, line.error or "no record can be read", line.excerpt)
    record = formats.parse_record(
        line.value, formats.Format(DatasetFormat.Name(format_).removeprefix(_FORMAT))
    )
    try:
        canonical = record_to_json(record).encode()
    except UnicodeEncodeError as error:
        found = f"U+{ord(error.object[error.start]):04X}"
        message = f"must be Unicode text, got the unpaired surrogate {found}"
        raise formats.RecordError("", "INVALID_TEXT", message, found) from error
    if len(canonical) > MAX_RECORD_BYTES:
        message = f"must be at most {MAX_RECORD_BYTES} bytes in canonical form, got {len(canonical)}"
        raise formats.RecordError("", "RECORD_TOO_LONG", message)
    return record, canonical


def _texts(record: Record) -> list[str]:
    match record:
        case ChatRecord():
            return [message.content for message in record.messages]
        case CompletionRecord():
            return [record.prompt, record.completion]
        case ChatPair():
            turns = (*record.messages, *record.chosen, *record.rejected)
            return [message.content for message in turns]
        case CompletionPair():
            return [record.prompt, record.chosen, record.rejected]


def _printable(text: str) -> str:
    short = text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 1] + "…"
    return short.encode(errors="replace").decode().translate(_WRITTEN_OUT)
