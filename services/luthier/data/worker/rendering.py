"""A version's shards to a rendering's: tokens and loss masks, statistics, and what teaches nothing."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet

from luthier.data.renderings.domain import (
    MAX_UNSUPERVISED,
    LengthPolicy,
    LengthStatistics,
    MaskMode,
    RefusedRecord,
    RenderingFinding,
    RenderingSplitStatistics,
    TemplateErrorPolicy,
    UnsupervisedRecord,
)
from luthier.data.splits import Split
from luthier.data.worker.findings import RecordFindings
from luthier.data.worker.parquet import ROW_SCHEMA, ShardWriter, WrittenShard
from luthier.data.worker.refusals import Refusals
from luthier.errors import Failure, InvalidArgument, Reason
from luthier.text import rendering as text
from luthier.text.panics import TokenizerError, tokenizer_errors
from luthier.text.records import Record, record_from_json
from luthier.text.statistics import Lengths
from luthier.text.templates import TemplateError
from luthier.text.tokenizer import TokenizerBundle

_BATCH_RECORDS = 64
# 2: answers are encoded apart from what asks for them, arguments of tool calls are objects.
_DIGEST_VERSION = "luthier-rendering-2"
_COLUMNS = ["record_id", "split", "filename", "line", "record"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderPlan:
    """What to render: files of records in row order, the tokenizer bundle's folder, settings, where to write."""

    shards: tuple[str, ...]
    bundle_folder: str
    output_folder: str
    dataset_digest: str
    tokenizer_digest: str
    chat_template: str
    mask_mode: MaskMode
    max_tokens: int
    length_policy: LengthPolicy
    template_date: str
    split_turns: bool = False
    template_error_policy: TemplateErrorPolicy = TemplateErrorPolicy.STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedVersion:
    """A rendering's content. `unsupervised` are the first `MAX_UNSUPERVISED`; the statistics count all.

    `errors` are the first `MAX_ERRORS` records that cannot be rendered, `num_errors` counts all. With a `failure`
    there are no shards.
    `effective_template`, `prefix_token_ids` and `stop_token_ids` say how a model that learns it is asked.
    """

    shards: tuple[WrittenShard, ...]
    splits: tuple[RenderingSplitStatistics, ...]
    unsupervised: tuple[UnsupervisedRecord, ...]
    warnings: tuple[str, ...]
    digest: str
    effective_template: str
    prefix_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    errors: tuple[RefusedRecord, ...] = ()
    num_errors: int = 0
    findings: tuple[RenderingFinding, ...] = ()
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


class RecordRenderer:
    """Renders the records of a plan one by one into shards. Memory: one row group."""

    def __init__(self, plan: RenderPlan) -> None:
        """Load tokenizer and template. Raises InvalidArgument MODEL_INVALID, TEMPLATE_INVALID."""
        self._plan = plan
        self._renderer = _renderer(plan)
        self._shards: list[WrittenShard] = []
        self._writer = ShardWriter(Path(plan.output_folder), "rows", ROW_SCHEMA, self._shards.append)
        self._counts: dict[Split, _Counts] = {}
        self._unsupervised: list[UnsupervisedRecord] = []
        self._findings = RecordFindings()
        self._refusals = Refusals(plan.template_error_policy)
        self._digest = hashlib.sha256(_settings_line(plan))

    def add(self, row: Mapping[str, Any]) -> None:
        """Render a stored record; what refuses it is kept for `finish`."""
        counts = self._counts.setdefault(Split(row["split"]), _Counts())
        counts.num_records += 1
        policy = text.LengthPolicy(self._plan.length_policy.value)
        try:
            with tokenizer_errors():
                rendered = self._rendered(record_from_json(row["record"]))
            fitted = [text.fit(one, self._plan.max_tokens, policy) for one in rendered]
        except (TemplateError, TokenizerError, text.RenderingError) as error:
            counts.num_refused += 1
            self._refusals.add(row, error)
            return
        if self._refusals.is_fatal:
            return  # it is only looked for others that are refused
        kept = [one for one, part in zip(rendered, fitted, strict=True) if part is not None]
        self._findings.add(row, [finding for one in kept for finding in one.findings])
        if not rendered:
            counts.num_without_row += 1
            self._note_unsupervised(row, "no row: every assistant turn has weight 0")
        for whole, part in zip(rendered, fitted, strict=True):
            self._add_row(row, counts, whole, part)

    def finish(self) -> RenderedVersion:
        """Close the files and return the rendering, or why it fails."""
        self._writer.close()
        failure = self._refusals.failure(sum(counts.num_records for counts in self._counts.values()))
        return RenderedVersion(
            shards=tuple(self._shards) if failure is None else (),
            splits=tuple(
                _split_statistics(split, self._counts[split]) for split in Split if split in self._counts
            ),
            unsupervised=tuple(self._unsupervised),
            warnings=tuple(self._warnings()) if failure is None else (),
            digest=self._digest.hexdigest() if failure is None else "",
            errors=self._refusals.records,
            num_errors=self._refusals.num_records,
            findings=self._findings.summary(),
            failure=failure,
            effective_template=self._renderer.effective_template,
            prefix_token_ids=self._renderer.prefix_ids,
            stop_token_ids=tuple(sorted(self._renderer.stop_token_ids())),
        )

    def _rendered(self, record: Record) -> tuple[text.Rendered, ...]:
        if self._plan.split_turns:
            return self._renderer.render_turns(record)
        return (self._renderer.render(record),)

    def _add_row(
        self, row: Mapping[str, Any], counts: _Counts, whole: text.Rendered, fitted: text.Rendered | None
    ) -> None:
        if fitted is None:
            counts.num_dropped += 1
            return
        counts.num_rows += 1
        counts.num_truncated += fitted.truncated
        counts.tokens.add(len(fitted.input_ids))
        counts.supervised.add(fitted.num_supervised)
        if fitted.num_supervised == 0:
            counts.num_unsupervised += 1
            self._note_unsupervised(row, _why_unsupervised(whole, fitted))
        self._write(row, fitted)

    def _write(self, row: Mapping[str, Any], fitted: text.Rendered) -> None:
        ids = array("i", fitted.input_ids)
        self._digest.update(f"{row['record_id']} {row['split']} {len(ids)}\n".encode())
        self._digest.update(ids.tobytes())
        self._digest.update(bytes(fitted.loss_mask))
        self._writer.add(
            {
                "record_id": row["record_id"],
                "split": row["split"],
                "filename": row["filename"],
                "line": row["line"],
                "input_ids": ids,
                "loss_mask": fitted.loss_mask,
                "num_tokens": len(ids),
                "num_supervised": fitted.num_supervised,
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
        train = self._counts.get(Split.TRAIN, _Counts())
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
        # They come from a conversation made up for it, which a template may refuse though it takes the records.
        with suppress(TemplateError, text.RenderingError):
            yield from self._renderer.warnings()


def render_plan(plan: RenderPlan, begin: Callable[[int, Mapping[str, Any]], None]) -> RenderedVersion:
    """Render all records of a plan; `begin` hears of each one before: how many are done, and the record.

    Raises InvalidArgument MODEL_INVALID, TEMPLATE_INVALID before any record; what is wrong with records is in what
    it returns.
    """
    renderer = RecordRenderer(plan)
    done = 0
    for path in plan.shards:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_BATCH_RECORDS, columns=_COLUMNS):
            for row in batch.to_pylist():
                begin(done, row)
                renderer.add(row)
                done += 1
    return renderer.finish()


def _renderer(plan: RenderPlan) -> text.Renderer:
    try:
        with tokenizer_errors():
            bundle = TokenizerBundle.load(Path(plan.bundle_folder))
    except ValueError as error:
        raise InvalidArgument(
            f"the model's tokenizer cannot be used: {error}", reason=Reason.MODEL_INVALID
        ) from error
    mask_mode = None if plan.mask_mode is MaskMode.DEFAULT else text.MaskMode(plan.mask_mode.value)
    try:
        return text.Renderer(
            bundle,
            today=date.fromisoformat(plan.template_date),
            template=plan.chat_template or None,
            mask_mode=mask_mode,
        )
    except TemplateError as error:
        raise InvalidArgument(
            f"{error}; pass one that does by --chat-template FILE (chat_template)",
            reason=Reason.TEMPLATE_INVALID,
        ) from error


def _why_unsupervised(whole: text.Rendered, fitted: text.Rendered) -> str:
    if whole.num_supervised:
        return (
            f"no token is learnt: the first one stands at {whole.loss_mask.index(True)}, "
            f"the record is cut at {len(fitted.input_ids)} tokens"
        )
    return "no token is learnt: every assistant turn has weight 0 or is empty"


def _split_statistics(split: Split, counts: _Counts) -> RenderingSplitStatistics:
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


def _settings_line(plan: RenderPlan) -> bytes:
    settings = {
        "version": _DIGEST_VERSION,
        "dataset_digest": plan.dataset_digest,
        "tokenizer_digest": plan.tokenizer_digest,
        "chat_template": plan.chat_template,
        "mask_mode": plan.mask_mode,
        "max_tokens": plan.max_tokens,
        "length_policy": plan.length_policy,
        "template_date": plan.template_date,
        "split_turns": plan.split_turns,
        "template_error_policy": plan.template_error_policy,
    }
    return json.dumps(settings, sort_keys=True).encode() + b"\n"
