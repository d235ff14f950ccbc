"""Renderings: the exact tokens and loss masks that a job trains on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.client import names
from luthier.client.arrow_batches import Row, read_batches
from luthier.client.async_driver import AsyncResource, async_method, async_stream_method
from luthier.client.events import Since, WaitOptions, wait, watch
from luthier.client.flows import Flow, Scope, StreamFlow, call, pages, replaced
from luthier.client.sync_driver import SyncResource, list_method, method, stream_method
from luthier.v1 import data_service_pb2 as api
from luthier.v1.dataset_pb2 import SPLIT_UNSPECIFIED, RecordError, Split
from luthier.v1.rendering_pb2 import RenderedRow, Rendering

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow

    from luthier.v1.event_pb2 import Event


def create(scope: Scope, rendering: Rendering, *, rendering_id: str = "") -> Flow[Rendering]:
    """Start rendering a version with a model's tokenizer. Follow it with `wait`.

    `rendering` names `dataset_version` and `model` (short names will do) and what else shall differ from the
    defaults.
    """
    resolved = replaced(
        rendering,
        dataset_version=names.version(scope.project, rendering.dataset_version),
        model=names.child(scope.project, "models", rendering.model),
    )
    request = api.CreateRenderingRequest(
        parent=names.project(scope.project), rendering=resolved, rendering_id=rendering_id
    )
    return call(scope, lambda stubs: stubs.data.CreateRendering, request)


def get(scope: Scope, name: str) -> Flow[Rendering]:
    """Read one rendering."""
    request = api.GetRenderingRequest(name=names.child(scope.project, "renderings", name))
    return call(scope, lambda stubs: stubs.data.GetRendering, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[Rendering]:
    """Go through the renderings of the project, newest first; `show_deleted`: what is deleted and not purged too."""
    request = api.ListRenderingsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(scope, lambda stubs: stubs.data.ListRenderings, request, lambda page: page.renderings)


def cancel(scope: Scope, name: str, *, etag: str = "") -> Flow[Rendering]:
    """Ask a rendering that is being made to stop."""
    request = api.CancelRenderingRequest(name=names.child(scope.project, "renderings", name), etag=etag)
    return call(scope, lambda stubs: stubs.data.CancelRendering, request)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[Rendering]:
    """Delete a rendering that has ended. Its name may be used again."""
    request = api.DeleteRenderingRequest(name=names.child(scope.project, "renderings", name), etag=etag)
    return call(scope, lambda stubs: stubs.data.DeleteRendering, request)


def undelete(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Rendering]:
    """Bring back a rendering that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteRenderingRequest(
        name=names.child(scope.project, "renderings", name), uid=uid, etag=etag
    )
    return call(scope, lambda stubs: stubs.data.UndeleteRendering, request)


def purge(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Rendering]:
    """Purge a rendering that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeRenderingRequest(
        name=names.child(scope.project, "renderings", name), uid=uid, etag=etag
    )
    return call(scope, lambda stubs: stubs.data.PurgeRendering, request)


def watch_events(scope: Scope, name: str, *, start_sequence: int = 0, uid: str = "") -> StreamFlow[Event]:
    """Follow a rendering's events, each once and in order, until it is READY, FAILED or CANCELLED.

    `uid` is that of the resource whose number `start_sequence` is, where another process saw it.
    """
    full = names.child(scope.project, "renderings", name)
    return watch(
        scope,
        (lambda stubs: stubs.data.WatchRendering, api.WatchRenderingRequest(name=full)),
        (lambda stubs: stubs.data.GetRendering, api.GetRenderingRequest(name=full)),
        Since(start_sequence=start_sequence, uid=uid),
    )


def wait_until_ready(
    scope: Scope,
    name: str,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Flow[Rendering]:
    """Return the rendering once it is READY.

    Raise `RenderingFailed` when it fails or is cancelled, DeadlineExceeded when time runs out.
    """
    full = names.child(scope.project, "renderings", name)
    return wait(
        scope,
        (lambda stubs: stubs.data.WatchRendering, api.WatchRenderingRequest(name=full)),
        (lambda stubs: stubs.data.GetRendering, api.GetRenderingRequest(name=full)),
        WaitOptions(timeout_seconds=timeout_seconds, on_event=on_event),
    )


def list_errors(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[RecordError]:
    """Go through the first 1,000 records that could not be rendered, by file and line."""
    request = api.ListRenderingErrorsRequest(
        parent=names.child(scope.project, "renderings", name), page_size=page_size
    )
    return pages(scope, lambda stubs: stubs.data.ListRenderingErrors, request, lambda page: page.errors)


def preview(
    scope: Scope,
    name: str,
    *,
    split: Split.ValueType = SPLIT_UNSPECIFIED,
    unsupervised_only: bool = False,
    page_size: int = 0,
) -> StreamFlow[RenderedRow]:
    """Go through rows token by token.

    The stored rows that a job reads. `unsupervised_only`: those that teach nothing.
    """
    request = api.PreviewRenderingRequest(
        name=names.child(scope.project, "renderings", name),
        split=split,
        unsupervised_only=unsupervised_only,
        page_size=page_size,
    )
    return pages(scope, lambda stubs: stubs.data.PreviewRendering, request, lambda page: page.rows)


def read(
    scope: Scope,
    name: str,
    *,
    split: Split.ValueType = SPLIT_UNSPECIFIED,
    lengths_only: bool = False,
    start_row: int = 0,
    uid: str = "",
) -> StreamFlow[pyarrow.RecordBatch]:
    """Stream the rows of a READY rendering as Arrow record batches. Needs pyarrow (extra `arrow`).

    Columns: row, record_id, split, filename, line, input_ids, loss_mask; of lengths: row, split, num_tokens,
    num_supervised. `uid` is that of the rendering whose row `start_row` is, where another process saw it.
    """
    full = names.child(scope.project, "renderings", name)
    view = api.ReadRenderingRequest.VIEW_LENGTHS if lengths_only else api.ReadRenderingRequest.VIEW_FULL
    return read_batches(
        scope,
        lambda stubs: stubs.data.ReadRendering,
        api.ReadRenderingRequest(name=full, split=split, view=view),
        (lambda stubs: stubs.data.GetRendering, api.GetRenderingRequest(name=full)),
        Row(start_row=start_row, uid=uid),
    )


class Renderings(SyncResource):
    """Renderings."""

    create = method(create)
    get = method(get)
    list = list_method(list_all)
    cancel = method(cancel)
    delete = method(delete)
    undelete = method(undelete)
    purge = method(purge)
    watch = stream_method(watch_events)
    wait = method(wait_until_ready)
    errors = list_method(list_errors)
    preview = list_method(preview)
    read = stream_method(read)


class AsyncRenderings(AsyncResource):
    """Renderings."""

    create = async_method(create)
    get = async_method(get)
    list = async_stream_method(list_all)
    cancel = async_method(cancel)
    delete = async_method(delete)
    undelete = async_method(undelete)
    purge = async_method(purge)
    watch = async_stream_method(watch_events)
    wait = async_method(wait_until_ready)
    errors = async_stream_method(list_errors)
    preview = async_stream_method(preview)
    read = async_stream_method(read)
