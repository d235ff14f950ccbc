"""BUILD_VERSION tasks: fetch the sources, have the version built, store the shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.data.worker.building import require_valid
from luthier.data.worker.order import BuildOrder, BuiltVersion
from luthier.data.worker.parquet import WrittenShard
from luthier.errors import LuthierError
from luthier.work.context import TaskContext, TaskFailed
from luthier.worker.v1 import task_pb2

Build = Callable[[BuildOrder, TaskContext], BuiltVersion]
"""Builds a version, for as long as a task's context wants it."""


def version_builder(build: Build) -> Callable[[TaskContext], task_pb2.TaskResult]:
    """Return the runner of BUILD_VERSION tasks.

    It raises InvalidArgument EMPTY_FILE or UNKNOWN_FORMAT; TaskFailed with InvalidArgument INVALID_RECORDS, the
    statistics and the first errors; what the context and `build` raise.
    """

    def build_version(context: TaskContext) -> task_pb2.TaskResult:
        spec = context.task.build_version
        sources = tuple(context.fetch(source.file) for source in spec.sources)
        made = build(BuildOrder(spec=spec, sources=sources, folder=context.scratch), context)
        try:
            require_valid(made.built, spec.invalid_record_policy)
        except LuthierError as error:
            raise TaskFailed(error, _result(made, ())) from error
        shards = store_shards(context, made.built.shards)
        total_bytes = sum(source.file.size_bytes for source in spec.sources)
        context.progress("building", total_bytes, total_bytes, "bytes")
        return _result(made, shards)

    return build_version


def store_shards(context: TaskContext, written: Sequence[WrittenShard]) -> list[task_pb2.Shard]:
    """Send finished files to the service."""
    stored = []
    for shard in written:
        context.check()
        file = context.store(shard.path, shard.path.name)
        stored.append(task_pb2.Shard(file=file, first_row=shard.first_row, num_rows=shard.num_rows))
    return stored


def _result(made: BuiltVersion, shards: Sequence[task_pb2.Shard]) -> task_pb2.TaskResult:
    result = task_pb2.BuildVersionResult(
        shards=shards,
        statistics=made.built.statistics,
        digest=made.built.digest,
        errors=made.built.errors,
        formats=made.formats,
        warnings=made.built.warnings,
    )
    return task_pb2.TaskResult(build_version=result)
