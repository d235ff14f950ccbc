"""A version's shards to a rendering's: tokens and loss masks, statistics, and what teaches nothing.

What renders a record is a process of its own or, in tests, this one; what is kept of it stands here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet

from luthier.data.renderings.rules import MAX_UNSUPERVISED
from luthier.data.splits import SPLITS, split_named
from luthier.data.worker.findings import RecordFindings
from luthier.data.worker.parquet import ROW_SCHEMA, ShardWriter, WrittenShard
from luthier.data.worker.record_rendering import RecordSettings, RenderedRecord, RenderedRow, Teaching
from luthier.data.worker.refusals import Refusals
from luthier.errors import Failure
from luthier.text.statistics import Lengths
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, Split
from luthier.v1.rendering_pb2 import (
    LengthStatistics,
    RenderingSplitStatistics,
    TemplateErrorPolicy,
    UnsupervisedRecord,
)
from luthier.work.limited import LimitReached
from luthier.worker.v1.task_pb2 import RenderResult, RenderSpec

_BATCH_RECORDS = 64
# 2: answers are encoded apart from what asks for them, arguments of tool calls are objects.
_DIGEST_VERSION = "luthier-rendering-2"
_COLUMNS = ["record_id", "split", "filename", "line", "record"]


class RendersRecords(Protocol):
    """What makes rows of records; `RecordRenderer` and `LimitedRenderer` do."""

    def teaching(self) -> Teaching:
        """Return how a model is asked that learns the rows."""
        ...

    def render(self, record: str) -> RenderedRecord:
        """Render a record given as its canonical JSON. Raises LimitReached."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOrder:
    """What to render: files of records in row order, how each is rendered, where to write."""

    spec: RenderSpec
    shards: tuple[str, ...]
    output_folder: str
    records: RecordSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedVersion:
    """A rendering's content: its files, and the result but for them and the tokenizer.

    Of records without a supervised token and of those that cannot be rendered the first ones are kept, all are
    counted. With a `failure` there are no shards.
    """

    shards: tuple[WrittenShard, ...]
    result: RenderResult
    failure: Failure | None = None


@dataclass(slots=True, kw_only=True)
class _Counts:
    tokens: Lengths = field(default_factory=Lengths)
    supervised: Lengths = field(default_factory=Lengths)
    num_rows: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_unsupervised: int = 0
    num_without_row: int = 0
    num_records: int = 0
    num_refused: int = 0


class RenderingWriter:
    """Takes in the records of an order one by one and writes their rows into shards. Memory: one row group."""

    def __init__(self, order: RenderOrder) -> None:
        self._shards: list[WrittenShard] = []
        self._writer = ShardWriter(Path(order.output_folder), "rows", ROW_SCHEMA, self._shards.append)
        self._counts: dict[Split.ValueType, _Counts] = {}
        self._unsupervised: list[UnsupervisedRecord] = []
        self._findings = RecordFindings()
        self._ending_ids: set[int] = set()
        self._refusals = Refusals(order.spec.template_error_policy)
        self._digest = hashlib.sha256(_settings_line(order))

    @property
    def is_over(self) -> bool:
        """Whether no more records need be looked at: the rendering fails, and each may take as long again."""
        return self._refusals.is_over

    def add(self, row: Mapping[str, Any], rendered: RenderedRecord) -> None:
        """Take in what became of a stored record."""
        counts = self._counts_of(row)
        if rendered.refused is not None:
            counts.num_refused += 1
            self._refusals.add(row, rendered.refused)
            return
        if self._refusals.is_fatal:
            return  # it is only looked for others that are refused
        self._findings.add(row, rendered.findings)
        self._ending_ids.update(rendered.ending_ids)
        counts.num_dropped += rendered.num_dropped
        if not rendered.rows and not rendered.num_dropped:
            counts.num_without_row += 1
            self._note_unsupervised(row, "no row: every assistant turn has weight 0")
        for one in rendered.rows:
            self._add_row(row, counts, one)

    def add_at_limit(self, row: Mapping[str, Any], limit: str) -> None:
        """Take in that a record took more than a limit allows."""
        self._counts_of(row).num_refused += 1
        self._refusals.add_at_limit(row, limit)

    def finish(self, teaching: Teaching) -> RenderedVersion:
        """Close the files and return the rendering, or why it fails."""
        self._writer.close()
        failure = self._refusals.failure(sum(counts.num_records for counts in self._counts.values()))
        result = RenderResult(
            split_statistics=[
                _split_statistics(split, self._counts[split]) for split in SPLITS if split in self._counts
            ],
            unsupervised_records=self._unsupervised,
            errors=self._refusals.records,
            num_errors=self._refusals.num_records,
            findings=self._findings.summary(),
            effective_chat_template=teaching.effective_template,
            prefix_token_ids=teaching.prefix_token_ids,
            stop_token_ids=sorted({*teaching.stop_token_ids, *self._ending_ids}),
        )
        if failure is not None:
            return RenderedVersion(shards=(), result=result, failure=failure)
        result.warnings.extend(self._warnings())
        result.digest = self._digest.hexdigest()
        return RenderedVersion(shards=tuple(self._shards), result=result)

    def _counts_of(self, row: Mapping[str, Any]) -> _Counts:
        counts = self._counts.setdefault(split_named(row["split"]), _Counts())
        counts.num_records += 1
        return counts

    def _add_row(self, row: Mapping[str, Any], counts: _Counts, rendered: RenderedRow) -> None:
        ids, mask = array("i", rendered.token_bytes()), rendered.mask_bytes()
        counts.num_rows += 1
        counts.num_truncated += rendered.truncated
        counts.tokens.add(len(ids))
        counts.supervised.add(rendered.num_supervised)
        if rendered.unsupervised:
            counts.num_unsupervised += 1
            self._note_unsupervised(row, rendered.unsupervised)
        self._digest.update(f"{row['record_id']} {row['split']} {len(ids)}\n".encode())
        self._digest.update(ids.tobytes())
        self._digest.update(mask)
        self._writer.add(
            {
                "record_id": row["record_id"],
                "split": row["split"],
                "filename": row["filename"],
                "line": row["line"],
                "input_ids": ids,
                "loss_mask": [flag != 0 for flag in mask],
                "num_tokens": len(ids),
                "num_supervised": rendered.num_supervised,
                "unit": self._writer.num_rows,
                "role": "",
            },
            # What the mask's Python values and the ids take until the row group is written.
            12 * len(ids) + 300,
        )

    def _note_unsupervised(self, row: Mapping[str, Any], message: str) -> None:
        if len(self._unsupervised) == MAX_UNSUPERVISED:
            return
        self._unsupervised.append(
            UnsupervisedRecord(
                record_id=row["record_id"], filename=row["filename"], line=row["line"], message=message
            )
        )

    def _warnings(self) -> Iterator[str]:
        train = self._counts.get(SPLIT_TRAIN, _Counts())
        if train.num_rows == 0:
            yield "the train split has no rows: there is nothing to learn from"
        elif train.num_rows == train.num_unsupervised:
            yield f"none of the {train.num_rows} rows of the train split has a token to learn"
        if self._refusals.num_records:
            first = self._refusals.records[0]
            yield (
                f"{self._refusals.num_records} records cannot be rendered and are left out; the first is "
                f"{first.filename}:{first.line}: {first.message}"
            )
        yield from self._findings.warnings()


def render_version(
    order: RenderOrder, renderer: RendersRecords, begin: Callable[[int, Mapping[str, Any]], None]
) -> RenderedVersion:
    """Render all records of an order; `begin` hears of each one before: how many are done, and the record.

    Raises what `renderer` raises but LimitReached for a record; what is wrong with records is in what is returned.
    """
    teaching = renderer.teaching()
    writer = RenderingWriter(order)
    for done, row in enumerate(_records(order)):
        begin(done, row)
        try:
            writer.add(row, renderer.render(row["record"]))
        except LimitReached as error:
            writer.add_at_limit(row, str(error))
        if writer.is_over:
            break
    return writer.finish(teaching)


def _records(order: RenderOrder) -> Iterator[Mapping[str, Any]]:
    for path in order.shards:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH_RECORDS, columns=_COLUMNS):
            yield from batch.to_pylist()


def _split_statistics(split: Split.ValueType, counts: _Counts) -> RenderingSplitStatistics:
    return RenderingSplitStatistics(
        split=split,
        tokens=LengthStatistics(**asdict(counts.tokens.summary())),
        supervised_tokens=LengthStatistics(**asdict(counts.supervised.summary())),
        num_dropped=counts.num_dropped,
        num_truncated=counts.num_truncated,
        num_unsupervised=counts.num_unsupervised + counts.num_without_row,
        num_records=counts.num_records,
        num_refused=counts.num_refused,
        num_without_row=counts.num_without_row,
    )


def _settings_line(order: RenderOrder) -> bytes:
    policy = TemplateErrorPolicy.Name(order.spec.template_error_policy)
    settings = {
        "version": _DIGEST_VERSION,
        "dataset_digest": order.spec.dataset_digest,
        "tokenizer_digest": order.spec.tokenizer_digest,
        "chat_template": order.records.chat_template,
        "mask_mode": order.records.mask_mode or "DEFAULT",
        "max_tokens": order.records.max_tokens,
        "length_policy": order.records.length_policy,
        "template_date": order.records.template_date,
        "split_turns": order.records.split_turns,
        "template_error_policy": policy.removeprefix("TEMPLATE_ERROR_POLICY_"),
    }
    return json.dumps(settings, sort_keys=True).encode() + b"\n"
