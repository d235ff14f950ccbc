"""A version's shards to a rendering's: tokens and loss masks, statistics, and what teaches nothing.

What renders a record is a process of its own or, in tests, this one; what is kept of it stands here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet

from luthier.data.renderings.rules import MAX_UNSUPERVISED
from luthier.data.splits import split_named
from luthier.data.worker.findings import RecordFindings
from luthier.data.worker.other_answers import OtherAnswers
from luthier.data.worker.parquet import PROMPT_SCHEMA, ROW_SCHEMA, ShardWriter, WrittenShard
from luthier.data.worker.record_rendering import RecordSettings, RenderedRecord, RenderedRow, Teaching
from luthier.data.worker.refusals import Refusals
from luthier.data.worker.row_counts import SplitCounts, count_warnings, split_statistics
from luthier.errors import Failure
from luthier.text.units import RenderingKind
from luthier.v1.dataset_pb2 import Split
from luthier.v1.rendering_pb2 import TemplateErrorPolicy, UnsupervisedRecord
from luthier.work.limited import LimitReached
from luthier.worker.v1.task_pb2 import RenderResult, RenderSpec

_BATCH_RECORDS = 64
# 2: answers are encoded apart from what asks for them, arguments of tool calls are objects.
_DIGEST_VERSION = "luthier-rendering-2"
# 3: rows have roles.
_UNITS_DIGEST_VERSION = "luthier-rendering-3"
_COLUMNS = ["record_id", "split", "filename", "line", "record"]


class RendersRecords(Protocol):
    """What makes rows of records; `RecordRenderer` and `LimitedRenderer` do."""

    def teaching(self) -> Teaching:
        """Return how a model is asked that learns the rows."""
        ...

    def render(self, record: str, other: str = "") -> RenderedRecord:
        """Render a record given as its canonical JSON, `other` as `RecordRenderer` has it. Raises LimitReached."""
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


class RenderingWriter:
    """Takes in the records of an order one by one and writes their rows into shards. Memory: one row group."""

    def __init__(self, order: RenderOrder) -> None:
        self._shards: list[WrittenShard] = []
        self._kind = RenderingKind(order.records.kind)
        schema = PROMPT_SCHEMA if self._kind is RenderingKind.PROMPT else ROW_SCHEMA
        self._writer = ShardWriter(Path(order.output_folder), "rows", schema, self._shards.append)
        self._counts: dict[Split.ValueType, SplitCounts] = {}
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
        if rendered.no_row:
            counts.num_without_row += 1
            self._note_unsupervised(row, rendered.no_row)
        if self._kind is RenderingKind.SUPERVISED:
            for one in rendered.rows:
                self._add_unit(row, counts, (one,))
        elif rendered.rows:
            self._add_unit(row, counts, rendered.rows)

    def add_at_limit(self, row: Mapping[str, Any], limit: str) -> None:
        """Take in that a record took more than a limit allows."""
        self._counts_of(row).num_refused += 1
        self._refusals.add_at_limit(row, limit)

    def finish(self, teaching: Teaching) -> RenderedVersion:
        """Close the files and return the rendering, or why it fails."""
        self._writer.close()
        failure = self._refusals.failure(sum(counts.num_records for counts in self._counts.values()))
        result = RenderResult(
            split_statistics=split_statistics(self._counts),
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

    def _counts_of(self, row: Mapping[str, Any]) -> SplitCounts:
        counts = self._counts.setdefault(split_named(row["split"]), SplitCounts())
        counts.num_records += 1
        return counts

    def _add_unit(self, row: Mapping[str, Any], counts: SplitCounts, rows: Sequence[RenderedRow]) -> None:
        unit = self._writer.num_rows
        num_tokens = sum(self._add_row(row, counts, one, unit) for one in rows)
        why = rows[0].unsupervised
        counts.add_unit(num_tokens, idle=bool(why))
        if why:
            self._note_unsupervised(row, why)

    def _add_row(self, row: Mapping[str, Any], counts: SplitCounts, rendered: RenderedRow, unit: int) -> int:
        """Write a row; return its tokens."""
        ids, mask = array("i", rendered.token_bytes()), rendered.mask_bytes()
        counts.add_row(
            rendered.role,
            len(ids),
            rendered.num_supervised,
            truncated=rendered.truncated,
            idle=bool(rendered.unsupervised),
        )
        role = f" {rendered.role}" if rendered.role else ""
        self._digest.update(f"{row['record_id']} {row['split']} {len(ids)}{role}\n".encode())
        self._digest.update(ids.tobytes())
        self._digest.update(mask)
        written = {
            "record_id": row["record_id"],
            "split": row["split"],
            "filename": row["filename"],
            "line": row["line"],
            "input_ids": ids,
            "loss_mask": [flag != 0 for flag in mask],
            "num_tokens": len(ids),
            "num_supervised": rendered.num_supervised,
            "unit": unit,
            "role": rendered.role,
        }
        # What the mask's Python values and the ids take until the row group is written.
        size_bytes = 12 * len(ids) + 300
        if self._kind is RenderingKind.PROMPT:
            written["record"] = row["record"]
            size_bytes += len(row["record"])
        self._writer.add(written, size_bytes)
        return len(ids)

    def _note_unsupervised(self, row: Mapping[str, Any], message: str) -> None:
        if len(self._unsupervised) == MAX_UNSUPERVISED:
            return
        self._unsupervised.append(
            UnsupervisedRecord(
                record_id=row["record_id"], filename=row["filename"], line=row["line"], message=message
            )
        )

    def _warnings(self) -> Iterator[str]:
        yield from count_warnings(self._counts)
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
    with _other_answers(order, begin) as other_answer:
        for done, row in enumerate(_records(order)):
            begin(done, row)
            try:
                writer.add(row, renderer.render(row["record"], other_answer(row)))
            except LimitReached as error:
                writer.add_at_limit(row, str(error))
            if writer.is_over:
                break
    return writer.finish(teaching)


@contextmanager
def _other_answers(
    order: RenderOrder, begin: Callable[[int, Mapping[str, Any]], None]
) -> Iterator[Callable[[Mapping[str, Any]], str]]:
    """Give what finds the answer that a record gets beside its own: nothing where rows are of one record alone."""
    if order.records.kind != RenderingKind.UNPAIRED:
        yield lambda _: ""
        return
    with closing(OtherAnswers(Path(order.output_folder) / "others.db")) as others:
        for row in _records(order):
            begin(0, row)
            others.add(row)
        others.finish()
        yield others.after


def _records(order: RenderOrder) -> Iterator[Mapping[str, Any]]:
    for path in order.shards:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH_RECORDS, columns=_COLUMNS):
            yield from batch.to_pylist()


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
    # Digests of before there were kinds stay what they are.
    if order.records.kind != RenderingKind.SUPERVISED:
        settings |= {"version": _UNITS_DIGEST_VERSION, "kind": order.records.kind}
    return json.dumps(settings, sort_keys=True).encode() + b"\n"
