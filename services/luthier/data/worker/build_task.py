"""BUILD_VERSION tasks: fetch the sources, build, store the shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from luthier.data.worker.building import Built, VersionBuilder, require_valid
from luthier.data.worker.parquet import WrittenShard
from luthier.data.worker.splitting import Place
from luthier.errors import LuthierError
from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.work.context import TaskContext, TaskFailed
from luthier.worker.v1 import task_pb2

_PROGRESS_SECONDS = 0.5


def build_version(context: TaskContext) -> task_pb2.TaskResult:
    """Run a BUILD_VERSION task.

    Raises InvalidArgument EMPTY_FILE or UNKNOWN_FORMAT; TaskFailed with InvalidArgument INVALID_RECORDS, the
    statistics and the first errors; what the context raises.
    """
    spec = context.task.build_version
    total_bytes = sum(source.file.size_bytes for source in spec.sources)
    progress = _Progress(context, total_bytes)
    splits = [source.split for source in spec.sources]
    builder = VersionBuilder(context.scratch, spec.split_settings, progress.tick, splits)
    formats: list[DatasetFormat.ValueType] = []
    for source in spec.sources:
        place = Place(filename=source.filename, split=source.split)
        with context.fetch(source.file).open("rb") as stream:
            progress.position = stream.tell
            formats.append(builder.read(stream, place, source.format))
            progress.begin_next(source.file.size_bytes)
    built = builder.finish()
    try:
        require_valid(built, spec.invalid_record_policy)
    except LuthierError as error:
        raise TaskFailed(error, _result(built, formats, ())) from error
    shards = store_shards(context, built.shards)
    progress.finish()
    return _result(built, formats, shards)


def store_shards(context: TaskContext, written: Sequence[WrittenShard]) -> list[task_pb2.Shard]:
    """Send finished files to the service."""
    stored = []
    for shard in written:
        context.check()
        file = context.store(shard.path, shard.path.name)
        stored.append(task_pb2.Shard(file=file, first_row=shard.first_row, num_rows=shard.num_rows))
    return stored


class _Progress:
    """Tells the service now and then how many bytes are read, and stops work that nobody wants."""

    def __init__(self, context: TaskContext, total_bytes: int) -> None:
        self.position: Callable[[], int] = lambda: 0
        self._context = context
        self._total_bytes = total_bytes
        self._before_bytes = 0
        self._last_seconds = 0.0

    def tick(self) -> None:
        self._context.check()
        now = time.monotonic()
        if now - self._last_seconds >= _PROGRESS_SECONDS:
            self._last_seconds = now
            self._report(min(self._before_bytes + self.position(), self._total_bytes))

    def begin_next(self, done_bytes: int) -> None:
        self._before_bytes += done_bytes
        self.position = lambda: 0

    def finish(self) -> None:
        self._report(self._total_bytes)

    def _report(self, completed_bytes: int) -> None:
        self._context.progress("building", completed_bytes, self._total_bytes, "bytes")


def _result(
    built: Built, formats: Sequence[DatasetFormat.ValueType], shards: Sequence[task_pb2.Shard]
) -> task_pb2.TaskResult:
    result = task_pb2.BuildVersionResult(
        shards=shards,
        statistics=built.statistics,
        digest=built.digest,
        errors=built.errors,
        formats=formats,
        warnings=built.warnings,
    )
    return task_pb2.TaskResult(build_version=result)
