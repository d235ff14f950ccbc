"""How resources look on a terminal: tables and lists of facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.client.cli.console import EscapingTable
from luthier.client.events import AnyWatched, state_of
from luthier.client.names import short

if TYPE_CHECKING:
    from google.protobuf.descriptor import EnumDescriptor
    from google.protobuf.timestamp_pb2 import Timestamp

    from luthier.v1.base_precision_pb2 import BasePrecision
    from luthier.v1.chat_pb2 import ChatMessage
    from luthier.v1.dataset_pb2 import Dataset, DatasetSource, DatasetVersion, Record, RecordError
    from luthier.v1.fine_tuning_job_pb2 import (
        ActivationCheckpointing,
        FineTuningPlan,
        MemoryEstimate,
        RenderingUse,
    )
    from luthier.v1.upload_pb2 import Upload

_STATE_STYLES = {
    "READY": "green",
    "SUCCEEDED": "green",
    "COMPLETE": "green",
    "FAILED": "bold red",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
    "PAUSED": "yellow",
    "PAUSING": "yellow",
}


def table(*columns: str) -> Table:
    """Return an empty table in the style of all our tables.

    A column whose name begins with `#` is for numbers.
    """
    made = EscapingTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column.startswith("#")
        made.add_column(column.lstrip("#"), justify="right" if is_number else "left", overflow="fold")
    return made


def facts(pairs: Iterable[tuple[str, Any]]) -> Table:
    """Return `label  value` lines; empty values are left out."""
    made = EscapingTable.grid(padding=(0, 2))
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for label, value in pairs:
        if value not in ("", None, 0):
            made.add_row(label, value if isinstance(value, Text | Table) else str(value))
    return made


def state(resource: AnyWatched | Upload) -> Text:
    """Return the state of a resource, coloured; of one that is deleted until when it can be brought back."""
    if resource.HasField("delete_time"):
        return Text(f"DELETED until {when(resource.purge_time)}", style="dim")
    name = state_of(resource)
    return Text(name, style=_STATE_STYLES.get(name, "cyan"))


def when(time: Timestamp) -> str:
    """Return a time in UTC to the second; empty for none."""
    return time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S") if time.seconds else ""


def number(value: float) -> str:
    """Return a number as people read it: separators for counts, four significant digits for the rest."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def size(size_bytes: int) -> str:
    """Return a size in binary units."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def mapping(values: Mapping[str, Any]) -> str:
    """Return `key=value` pairs in order of keys."""
    return ", ".join(
        f"{key}={number(value) if isinstance(value, float) else value}"
        for key, value in sorted(values.items())
    )


def failure(resource: AnyWatched) -> Text | str:
    """Return why a resource failed; empty when it did not."""
    return Text(resource.error.message, style="red") if resource.HasField("error") else ""


def waiting(resource: AnyWatched) -> Text | str:
    """Return why nobody works for a resource that is queued; empty where somebody can."""
    return Text(resource.waiting.message, style="yellow") if resource.HasField("waiting") else ""


def dataset_table(datasets: Iterable[Dataset]) -> Table:
    """Return datasets, a row each."""
    made = table("NAME", "DISPLAY NAME", "LABELS", "CREATED (UTC)")
    for dataset in datasets:
        made.add_row(
            short(dataset.name), dataset.display_name, mapping(dataset.labels), when(dataset.create_time)
        )
    return made


def upload_table(uploads: Iterable[Upload]) -> Table:
    """Return uploads, a row each."""
    made = table("UPLOAD", "STATE", "FILE", "#STORED", "#SIZE", "CREATED (UTC)")
    for upload in uploads:
        made.add_row(
            short(upload.name),
            state(upload),
            upload.filename,
            size(upload.persisted_size_bytes),
            size(upload.size_bytes) if upload.size_bytes else "",
            when(upload.create_time),
        )
    return made


def upload_facts(upload: Upload) -> Table:
    """Return what an upload is and how far it has come."""
    return facts(
        [
            ("upload", short(upload.name)),
            ("state", state(upload)),
            ("file", upload.filename),
            ("stored", size(upload.persisted_size_bytes)),
            ("size", size(upload.size_bytes) if upload.size_bytes else ""),
            ("sha256", upload.sha256),
            ("created", when(upload.create_time)),
        ]
    )


def version_table(versions: Iterable[DatasetVersion]) -> Table:
    """Return versions, a row each."""
    made = table("VERSION", "STATE", "#RECORDS", "#INVALID", "#DUPLICATES", "CREATED (UTC)")
    for version in versions:
        counts = version.statistics
        made.add_row(
            short(version.name),
            state(version),
            *(number(count) for count in (counts.num_records, counts.num_invalid, counts.num_duplicates)),
            when(version.create_time),
        )
    return made


def version_facts(version: DatasetVersion) -> Group:
    """Return what a version holds: counts, then a row for each split."""
    counts = version.statistics
    splits = table("SPLIT", "#RECORDS", "#MESSAGES", "#CHARACTERS")
    for entry in counts.splits:
        splits.add_row(
            split_name(entry.split),
            number(entry.num_records),
            number(entry.num_messages),
            number(entry.num_characters),
        )
    head = facts(
        [
            ("version", short(version.name)),
            ("state", state(version)),
            ("failure", failure(version)),
            ("waiting", waiting(version)),
            ("read", f"{number(counts.num_records_read)} records" if counts.num_records_read else ""),
            ("kept", f"{number(counts.num_records)} records" if counts.num_records_read else ""),
            ("duplicates", number(counts.num_duplicates) if counts.num_duplicates else ""),
            ("invalid", number(counts.num_invalid) if counts.num_invalid else ""),
            ("sources", ", ".join(map(_source, version.sources))),
            ("digest", version.digest),
            ("labels", mapping(version.labels)),
        ]
    )
    warnings = [Text(f"warning: {warning}", "yellow") for warning in version.warnings]
    return Group(head, *((Text(""), splits) if splits.row_count else ()), *warnings)


def _source(source: DatasetSource) -> str:
    from luthier.v1.dataset_pb2 import DatasetFormat

    if not source.detected_format:
        return source.filename
    return f"{source.filename} ({_enum_name(DatasetFormat.DESCRIPTOR, source.detected_format)})"


def _enum_name(enum: EnumDescriptor, number: int) -> str:
    """Return an enum value's name as files take it, e.g. openai-chat; its number where this client is too old."""
    if number not in enum.values_by_number:
        return str(number)
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    name: str = enum.values_by_number[number].name
    return name.removeprefix(prefix).lower().replace("_", "-")


def error_table(errors: Iterable[RecordError]) -> Table:
    """Return bad records: where, what, the offending value."""
    made = table("WHERE", "PATH", "REASON", "MESSAGE", "VALUE")
    for error in errors:
        made.add_row(
            f"{error.filename}:{error.line}",
            error.path,
            Text(error.reason, "red"),
            error.message,
            error.value,
        )
    return made


def record_table(records: Iterable[Record]) -> Table:
    """Return records in brief."""
    made = table("#ROW", "SPLIT", "WHERE", "EXAMPLE")
    for record in records:
        text = Text("\n").join(
            Text.assemble((f"{name}: ", "bold"), content) for name, content in _example(record)
        )
        made.add_row(str(record.row), split_name(record.split), f"{record.filename}:{record.line}", text)
    return made


def _example(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the parts of an example, each with its name; what both sides of a pair answer comes once."""
    from luthier.v1.chat_pb2 import Label

    kind = record.WhichOneof("example")
    if kind == "conversation":
        yield from ((turn.role, _said(turn)) for turn in record.conversation.messages)
    elif kind == "conversation_pair":
        pair = record.conversation_pair
        yield from ((turn.role, _said(turn)) for turn in pair.messages)
        for side, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            for turn in turns:
                yield side if len(turns) == 1 else f"{side}, {turn.role}", _said(turn)
    elif kind == "completion_pair":
        texts = record.completion_pair
        yield from (("prompt", texts.prompt), ("chosen", texts.chosen), ("rejected", texts.rejected))
    else:
        plain = record.prompt_completion
        yield from (("prompt", plain.prompt), ("completion", plain.completion))
    if record.label:
        yield "label", _enum_name(Label.DESCRIPTOR, record.label)


def _said(turn: ChatMessage) -> str:
    """Return what a turn says: its text, and the tools that it calls."""
    return " ".join(filter(None, (turn.content, turn.tool_calls_json)))


def plan_facts(plan: FineTuningPlan) -> Group:
    """Return what a job would do, and what to look at before starting it."""
    left_out = [
        (count, word)
        for count, word in (
            (plan.num_dropped, "dropped"),
            (plan.num_truncated, "truncated"),
            (plan.num_unsupervised, "with nothing to learn"),
        )
        if count
    ]
    head = facts(
        [
            ("training rows", number(plan.num_train_rows)),
            ("validation rows", number(plan.num_validation_rows)),
            ("steps", f"{number(plan.num_steps)} ({number(plan.num_steps_per_epoch)} per epoch)"),
            (
                "tokens",
                ("at most " if plan.resolved_job.HasField("reinforcement") else "")
                + f"{number(plan.num_tokens)}, of which {number(plan.num_supervised_tokens)} are learnt",
            ),
            ("packing", f"{plan.packing_efficiency:.0%}"),
            ("left out", ", ".join(f"{number(count)} {word}" for count, word in left_out)),
            *_costs(plan),
        ]
    )
    warnings = [Text(f"warning: {warning}", "yellow") for warning in plan.warnings]
    return Group(head, *((Text(""), _uses(plan.renderings)) if plan.renderings else ()), *warnings)


def _costs(plan: FineTuningPlan) -> Iterator[tuple[str, str]]:
    """Yield what memory and time a job takes on the device that it was planned for."""
    if not plan.HasField("memory"):
        return
    yield "memory", memory(plan.memory)
    yield "passes", passes(plan.micro_batch_tokens, plan.activation_checkpointing)
    if plan.total_seconds:
        yield "time", f"about {plan.seconds_per_step:,.3g} s a step, {plan.total_seconds:,.0f} s in all"


def memory(estimate: MemoryEstimate) -> str:
    """Return what memory is expected to be taken, part by part; empty where nothing is known."""
    parts = [
        f"{field.name.removesuffix('_bytes')} {size(value)}"
        for field, value in estimate.ListFields()
        if field.name != "peak_bytes"
    ]
    return f"{size(estimate.peak_bytes)}: {', '.join(parts)}" if parts else ""


def passes(micro_batch_tokens: int, checkpointing: ActivationCheckpointing.ValueType) -> str:
    """Return what passes are; empty where that is not chosen yet."""
    from luthier.v1.fine_tuning_job_pb2 import ActivationCheckpointing

    if not micro_batch_tokens:
        return ""
    kept = ActivationCheckpointing.Name(checkpointing).rpartition("_")[2].lower()
    return f"of at most {number(micro_batch_tokens)} tokens, activation checkpointing {kept}"


def precision(chosen: BasePrecision.ValueType) -> str:
    """Return what a base model is held in; empty where nothing says it."""
    from luthier.v1.base_precision_pb2 import BasePrecision

    return BasePrecision.Name(chosen).rpartition("_")[2].lower() if chosen else ""


def _uses(renderings: Iterable[RenderingUse]) -> Table:
    """Return what a job takes of each rendering that it mixes."""
    made = table(
        "RENDERING", "#SHARE", "#REACHED", "#ROWS", "#TOKENS", "#LEARNT", "#EPOCHS", "#VALIDATION ROWS"
    )
    for use in renderings:
        made.add_row(
            short(use.rendering),
            f"{use.share:.1%}",
            f"{use.reached_share:.1%}",
            number(use.num_rows),
            number(use.num_tokens),
            number(use.num_supervised_tokens),
            f"{use.num_epochs:.3g}",
            number(use.num_validation_rows),
        )
    return made


def split_name(split: int) -> str:
    """Return a split in lower case; empty for none."""
    from luthier.v1.dataset_pb2 import Split

    return "" if split == 0 else Split.keys()[split].removeprefix("SPLIT_").lower()


def rows(made: Table, entries: Iterable[Sequence[Any]]) -> Table:
    """Add a row for each entry and return the table."""
    for entry in entries:
        made.add_row(*(value if isinstance(value, Text) else str(value) for value in entry))
    return made
