"""Versions built and rendered as a task says, at a desk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from luthier.data.worker.building import VersionBuilder
from luthier.data.worker.limited_renderer import LimitedRenderer
from luthier.data.worker.order import BuildOrder, BuiltVersion, Desk
from luthier.data.worker.splitting import Place
from luthier.data.worker.version_rendering import RenderedVersion, RenderOrder, render_version
from luthier.errors import Internal, InvalidArgument, Reason, Unavailable
from luthier.storage.disk import disk_full, is_full
from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.work.limited import LimitReached, ProcessBroken, ProcessKilled
from luthier.work.limited_child import Limits

_REPORT_SECONDS = 0.5


def built(order: BuildOrder, desk: Desk) -> BuiltVersion:
    """Build a version into the order's folder.

    Raises:
        InvalidArgument: EMPTY_FILE or UNKNOWN_FORMAT.
        LuthierError: what the desk raised.
    """
    spec = order.spec
    progress = _Progress(desk, sum(source.file.size_bytes for source in spec.sources))
    splits = [source.split for source in spec.sources]
    builder = VersionBuilder(order.folder, spec.split_settings, progress.tick, splits)
    formats: list[DatasetFormat.ValueType] = []
    for source, path in zip(spec.sources, order.sources, strict=True):
        place = Place(filename=source.filename, split=source.split)
        with path.open("rb") as stream:
            progress.position = stream.tell
            formats.append(builder.read(stream, place, source.format))
            progress.begin_next(source.file.size_bytes)
    return BuiltVersion(built=builder.finish(), formats=tuple(formats))


def rendered(order: RenderOrder, desk: Desk, limits: Limits) -> RenderedVersion:
    """Render a version, its template and tokenizer in a limited process, each part of a record within `limits`.

    Raises:
        InvalidArgument: MODEL_INVALID, the tokenizer or the template takes too much to be read.
        Unavailable: WORKER_LOST, the limited process was killed.
        Internal: it failed in a way that nobody foresaw.
        ResourceExhausted: DISK_FULL.
        LuthierError: what the desk raised.
    """
    total = sum(shard.num_rows for shard in order.spec.shards)
    place = {"filename": "", "line": "0"}
    next_report = 0.0

    def begin(done: int, row: Mapping[str, Any]) -> None:
        nonlocal place, next_report
        place = {"filename": row["filename"], "line": str(row["line"])}
        if time.monotonic() >= next_report:
            desk.check()
            desk.progress("rendering", done, total, "records")
            next_report = time.monotonic() + _REPORT_SECONDS

    with closing(LimitedRenderer(order.records, limits, Path(order.output_folder), desk.check)) as renderer:
        try:
            return render_version(order, renderer, begin)
        except LimitReached as error:  # before a record, or another one follows
            raise InvalidArgument(
                f"the model's tokenizer and the chat template take more than {error} to be read",
                reason=Reason.MODEL_INVALID,
            ) from error
        except ProcessKilled as error:
            raise Unavailable(
                "the rendering process was killed from outside", reason=Reason.WORKER_LOST
            ) from error
        except ProcessBroken as error:
            raise Internal(
                f"the rendering process failed at {place['filename']}:{place['line']}: {error}",
                metadata=place,
            ) from error
        except OSError as error:
            if not is_full(error):
                raise
            raise disk_full(str(error)) from error


class _Progress:
    """Tells now and then how many bytes are read, and stops work that nobody wants."""

    def __init__(self, desk: Desk, total_bytes: int) -> None:
        self.position: Callable[[], int] = lambda: 0
        self._desk = desk
        self._total_bytes = total_bytes
        self._before_bytes = 0
        self._last_seconds = 0.0

    def tick(self) -> None:
        self._desk.check()
        now = time.monotonic()
        if now - self._last_seconds >= _REPORT_SECONDS:
            self._last_seconds = now
            done_bytes = min(self._before_bytes + self.position(), self._total_bytes)
            self._desk.progress("building", done_bytes, self._total_bytes, "bytes")

    def begin_next(self, done_bytes: int) -> None:
        self._before_bytes += done_bytes
        self.position = lambda: 0
