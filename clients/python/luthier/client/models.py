"""Models: base models and the adapters tuned on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from luthier.client import names
from luthier.client.async_driver import AsyncResource, async_method, async_stream_method
from luthier.client.downloads import download
from luthier.client.events import Since, WaitOptions, wait, watch
from luthier.client.flows import Flow, Scope, StreamFlow, call, pages
from luthier.client.sync_driver import SyncResource, list_method, method, stream_method
from luthier.v1 import model_service_pb2 as api
from luthier.v1.model_pb2 import EXPORT_FORMAT_GGUF_F16, EXPORT_FORMAT_GGUF_Q8_0, Model, ModelFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from luthier.v1.event_pb2 import Event

ExportFormat = Literal["gguf-f16", "gguf-q8_0"]
"""How a model is written for other programs."""
_FORMATS = {"gguf-f16": EXPORT_FORMAT_GGUF_F16, "gguf-q8_0": EXPORT_FORMAT_GGUF_Q8_0}


def register_base(scope: Scope, model: Model, *, model_id: str = "") -> Flow[Model]:
    """Take in a base model from the source that `model` names.

    `hub`, `directory` or `gguf_path`. Follow it with `wait`.

    Paths are those of the training worker's machine and lie below its allowed roots.
    """
    request = api.RegisterBaseModelRequest(
        parent=names.project(scope.project), model=model, model_id=model_id
    )
    return call(scope, lambda stubs: stubs.models.RegisterBaseModel, request)


def merge(
    scope: Scope,
    name: str,
    *,
    model_id: str = "",
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
) -> Flow[Model]:
    """Make a model with all its weights from an adapter, or from a checkpoint of one. Follow it with `wait`."""
    request = api.MergeModelRequest(
        name=names.weights(scope.project, name), model_id=model_id, display_name=display_name, labels=labels
    )
    return call(scope, lambda stubs: stubs.models.MergeModel, request)


def export(
    scope: Scope,
    name: str,
    format: ExportFormat,  # noqa: A002 - the name on the wire
    *,
    model_id: str = "",
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
) -> Flow[Model]:
    """Write a model, an adapter or a checkpoint as a file for other programs.

    `format` is "gguf-f16" or "gguf-q8_0". Follow the export with `wait`, then `download` it.

    Raises:
        InvalidArgument: EXPORT_NOT_POSSIBLE; models of this architecture have no such form.
    """
    request = api.ExportModelRequest(
        name=names.weights(scope.project, name),
        format=_FORMATS[format],
        model_id=model_id,
        display_name=display_name,
        labels=labels,
    )
    return call(scope, lambda stubs: stubs.models.ExportModel, request)


def get(scope: Scope, name: str) -> Flow[Model]:
    """Read one model."""
    request = api.GetModelRequest(name=names.weights(scope.project, name))
    return call(scope, lambda stubs: stubs.models.GetModel, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[Model]:
    """Go through the models of the project, newest first; with `show_deleted` what is deleted and not purged too."""
    request = api.ListModelsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(scope, lambda stubs: stubs.models.ListModels, request, lambda page: page.models)


def cancel(scope: Scope, name: str, *, etag: str = "") -> Flow[Model]:
    """Ask a model that is being registered, merged or exported to stop. One that has ended is returned unchanged."""
    request = api.CancelModelRequest(name=names.child(scope.project, "models", name), etag=etag)
    return call(scope, lambda stubs: stubs.models.CancelModel, request)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[Model]:
    """Delete a model that nothing stands on. Its name may be used again."""
    request = api.DeleteModelRequest(name=names.child(scope.project, "models", name), etag=etag)
    return call(scope, lambda stubs: stubs.models.DeleteModel, request)


def undelete(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Model]:
    """Bring back a model that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteModelRequest(name=names.child(scope.project, "models", name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.models.UndeleteModel, request)


def purge(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Model]:
    """Purge a model that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeModelRequest(name=names.child(scope.project, "models", name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.models.PurgeModel, request)


def watch_events(scope: Scope, name: str, *, start_sequence: int = 0, uid: str = "") -> StreamFlow[Event]:
    """Follow a model's events, each once and in order, until it is READY, FAILED or CANCELLED.

    `uid` is that of the resource whose number `start_sequence` is, where another process saw it.
    """
    full = names.child(scope.project, "models", name)
    return watch(
        scope,
        (lambda stubs: stubs.models.WatchModel, api.WatchModelRequest(name=full)),
        (lambda stubs: stubs.models.GetModel, api.GetModelRequest(name=full)),
        Since(start_sequence=start_sequence, uid=uid),
    )


def wait_until_ready(
    scope: Scope,
    name: str,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Flow[Model]:
    """Return the model once it is READY.

    Raise `ModelFailed` when it fails or is cancelled, DeadlineExceeded when time runs out.
    """
    full = names.child(scope.project, "models", name)
    return wait(
        scope,
        (lambda stubs: stubs.models.WatchModel, api.WatchModelRequest(name=full)),
        (lambda stubs: stubs.models.GetModel, api.GetModelRequest(name=full)),
        WaitOptions(timeout_seconds=timeout_seconds, on_event=on_event),
    )


def list_files(scope: Scope, name: str) -> StreamFlow[ModelFile]:
    """Go through the files of a READY model, by path."""
    request = api.ListModelFilesRequest(parent=names.weights(scope.project, name))
    return pages(scope, lambda stubs: stubs.models.ListModelFiles, request, lambda page: page.files)


class Models(SyncResource):
    """Models."""

    register_base = method(register_base)
    merge = method(merge)
    export = method(export)
    get = method(get)
    list = list_method(list_all)
    cancel = method(cancel)
    delete = method(delete)
    undelete = method(undelete)
    purge = method(purge)
    watch = stream_method(watch_events)
    wait = method(wait_until_ready)
    files = list_method(list_files)
    download = method(download)


class AsyncModels(AsyncResource):
    """Models."""

    register_base = async_method(register_base)
    merge = async_method(merge)
    export = async_method(export)
    get = async_method(get)
    list = async_stream_method(list_all)
    cancel = async_method(cancel)
    delete = async_method(delete)
    undelete = async_method(undelete)
    purge = async_method(purge)
    watch = async_stream_method(watch_events)
    wait = async_method(wait_until_ready)
    files = async_stream_method(list_files)
    download = async_method(download)
