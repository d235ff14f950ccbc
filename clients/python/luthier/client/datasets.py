"""Datasets, the uploads they are made from, and their immutable versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from luthier.client import names
from luthier.client.arrow_batches import Row, read_batches
from luthier.client.async_driver import AsyncDriver, AsyncResource, async_method, async_stream_method
from luthier.client.events import Since, WaitOptions, wait, watch
from luthier.client.flows import Flow, Scope, StreamFlow, call, pages
from luthier.client.sync_driver import SyncDriver, SyncResource, list_method, method, stream_method
from luthier.client.uploads import upload
from luthier.errors import FieldViolation, InvalidArgument
from luthier.v1 import data_service_pb2 as api
from luthier.v1.dataset_pb2 import (
    SPLIT_UNSPECIFIED,
    Dataset,
    DatasetSource,
    DatasetVersion,
    Record,
    RecordError,
    Split,
)
from luthier.v1.upload_pb2 import Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow

    from luthier.v1.event_pb2 import Event


def create(
    scope: Scope,
    dataset: str | Dataset = "",
    *,
    dataset_id: str = "",
    display_name: str = "",
    labels: Mapping[str, str] | None = None,
) -> Flow[Dataset]:
    """Create an empty dataset, given by its id or as a message. Without an id the service makes one.

    `display_name` and `labels`, where given, win over those of the message.
    """
    wanted = Dataset()
    if isinstance(dataset, Dataset):
        wanted.CopyFrom(dataset)
    elif dataset and dataset_id:
        description = f"must be given once, got {dataset!r} and {dataset_id!r}"
        raise InvalidArgument.of_fields(FieldViolation(field="dataset_id", description=description))
    else:
        dataset_id = dataset or dataset_id
    wanted.MergeFrom(Dataset(display_name=display_name, labels=labels or {}))
    request = api.CreateDatasetRequest(
        parent=names.project(scope.project), dataset=wanted, dataset_id=dataset_id
    )
    return call(scope, lambda stubs: stubs.data.CreateDataset, request)


def get(scope: Scope, name: str) -> Flow[Dataset]:
    """Read one dataset."""
    request = api.GetDatasetRequest(name=names.child(scope.project, "datasets", name))
    return call(scope, lambda stubs: stubs.data.GetDataset, request)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[Dataset]:
    """Delete a dataset without versions. Its name may be used again."""
    request = api.DeleteDatasetRequest(name=names.child(scope.project, "datasets", name), etag=etag)
    return call(scope, lambda stubs: stubs.data.DeleteDataset, request)


def undelete(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Dataset]:
    """Bring back a dataset that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteDatasetRequest(
        name=names.child(scope.project, "datasets", name), uid=uid, etag=etag
    )
    return call(scope, lambda stubs: stubs.data.UndeleteDataset, request)


def purge(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Dataset]:
    """Purge a dataset that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeDatasetRequest(name=names.child(scope.project, "datasets", name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.data.PurgeDataset, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[Dataset]:
    """Go through the datasets of the project, newest first; with `show_deleted` what is deleted and not purged too."""
    request = api.ListDatasetsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(scope, lambda stubs: stubs.data.ListDatasets, request, lambda page: page.datasets)


def get_upload(scope: Scope, name: str) -> Flow[Upload]:
    """Read one upload; its `persisted_size_bytes` is what the service has stored."""
    request = api.GetUploadRequest(name=names.child(scope.project, "uploads", name))
    return call(scope, lambda stubs: stubs.data.GetUpload, request)


def list_uploads(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[Upload]:
    """Go through the uploads of the project, newest first; `state = "RECEIVING"` finds those that go on.

    With `show_deleted` what is deleted and not purged comes too.
    """
    request = api.ListUploadsRequest(
        parent=names.project(scope.project),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(scope, lambda stubs: stubs.data.ListUploads, request, lambda page: page.uploads)


def cancel_upload(scope: Scope, name: str, *, etag: str = "") -> Flow[Upload]:
    """Give an upload up and remove its bytes."""
    request = api.CancelUploadRequest(name=names.child(scope.project, "uploads", name), etag=etag)
    return call(scope, lambda stubs: stubs.data.CancelUpload, request)


def delete_upload(scope: Scope, name: str, *, etag: str = "") -> Flow[Upload]:
    """Delete an upload that is complete or cancelled. Versions built from it stay."""
    request = api.DeleteUploadRequest(name=names.child(scope.project, "uploads", name), etag=etag)
    return call(scope, lambda stubs: stubs.data.DeleteUpload, request)


def undelete_upload(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Upload]:
    """Bring back an upload that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteUploadRequest(name=names.child(scope.project, "uploads", name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.data.UndeleteUpload, request)


def purge_upload(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[Upload]:
    """Purge an upload that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeUploadRequest(name=names.child(scope.project, "uploads", name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.data.PurgeUpload, request)


def create_version(
    scope: Scope,
    dataset: str,
    sources: Iterable[Upload | DatasetSource] | None = None,
    *,
    version_id: str = "",
    settings: DatasetVersion | None = None,
) -> Flow[DatasetVersion]:
    """Start building a version from uploads. Follow it with `versions.wait`.

    An `Upload` is a source whose records are split by their hash; a `DatasetSource` says its split or format
    itself. `settings` is the version that is wanted; `sources`, if given, take the place of those that it names.
    """
    version = DatasetVersion()
    version.CopyFrom(settings or DatasetVersion())
    if sources is not None:
        del version.sources[:]
    for source in sources or ():
        version.sources.add().CopyFrom(
            DatasetSource(upload=source.name) if isinstance(source, Upload) else source
        )
    for added in version.sources:
        added.upload = names.child(scope.project, "uploads", added.upload)
    request = api.CreateDatasetVersionRequest(
        parent=names.child(scope.project, "datasets", dataset),
        dataset_version=version,
        dataset_version_id=version_id,
    )
    return call(scope, lambda stubs: stubs.data.CreateDatasetVersion, request)


def get_version(scope: Scope, name: str) -> Flow[DatasetVersion]:
    """Read one version."""
    request = api.GetDatasetVersionRequest(name=names.version(scope.project, name))
    return call(scope, lambda stubs: stubs.data.GetDatasetVersion, request)


def list_versions(
    scope: Scope,
    dataset: str,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
    show_deleted: bool = False,
) -> StreamFlow[DatasetVersion]:
    """Go through the versions of a dataset, newest first; with `show_deleted` what is deleted and not purged too."""
    request = api.ListDatasetVersionsRequest(
        parent=names.child(scope.project, "datasets", dataset),
        filter=filter,
        order_by=order_by,
        page_size=page_size,
        show_deleted=show_deleted,
    )
    return pages(
        scope, lambda stubs: stubs.data.ListDatasetVersions, request, lambda page: page.dataset_versions
    )


def cancel_version(scope: Scope, name: str, *, etag: str = "") -> Flow[DatasetVersion]:
    """Ask a version that is being built to stop."""
    request = api.CancelDatasetVersionRequest(name=names.version(scope.project, name), etag=etag)
    return call(scope, lambda stubs: stubs.data.CancelDatasetVersion, request)


def delete_version(scope: Scope, name: str, *, etag: str = "") -> Flow[DatasetVersion]:
    """Delete a version that has ended. Its name may be used again."""
    request = api.DeleteDatasetVersionRequest(name=names.version(scope.project, name), etag=etag)
    return call(scope, lambda stubs: stubs.data.DeleteDatasetVersion, request)


def undelete_version(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[DatasetVersion]:
    """Bring back a version that was deleted, until it is purged; `uid`: which of several that had the name."""
    request = api.UndeleteDatasetVersionRequest(name=names.version(scope.project, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.data.UndeleteDatasetVersion, request)


def purge_version(scope: Scope, name: str, *, uid: str = "", etag: str = "") -> Flow[DatasetVersion]:
    """Purge a version that was deleted, at once and for good; `uid` as in `undelete`."""
    request = api.PurgeDatasetVersionRequest(name=names.version(scope.project, name), uid=uid, etag=etag)
    return call(scope, lambda stubs: stubs.data.PurgeDatasetVersion, request)


def watch_version(scope: Scope, name: str, *, start_sequence: int = 0, uid: str = "") -> StreamFlow[Event]:
    """Follow a version's events, each once and in order, until it is READY, FAILED or CANCELLED.

    `uid` is that of the resource whose number `start_sequence` is, where another process saw it.
    """
    full = names.version(scope.project, name)
    return watch(
        scope,
        (lambda stubs: stubs.data.WatchDatasetVersion, api.WatchDatasetVersionRequest(name=full)),
        (lambda stubs: stubs.data.GetDatasetVersion, api.GetDatasetVersionRequest(name=full)),
        Since(start_sequence=start_sequence, uid=uid),
    )


def wait_for_version(
    scope: Scope,
    name: str,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Flow[DatasetVersion]:
    """Return the version once it is READY.

    Raise `VersionFailed` when it fails or is cancelled, DeadlineExceeded when time runs out.
    """
    full = names.version(scope.project, name)
    return wait(
        scope,
        (lambda stubs: stubs.data.WatchDatasetVersion, api.WatchDatasetVersionRequest(name=full)),
        (lambda stubs: stubs.data.GetDatasetVersion, api.GetDatasetVersionRequest(name=full)),
        WaitOptions(timeout_seconds=timeout_seconds, on_event=on_event),
    )


def list_errors(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[RecordError]:
    """Go through the first 1,000 bad records of a version, by file and line."""
    request = api.ListDatasetVersionErrorsRequest(
        parent=names.version(scope.project, name), page_size=page_size
    )
    return pages(scope, lambda stubs: stubs.data.ListDatasetVersionErrors, request, lambda page: page.errors)


def list_records(
    scope: Scope, name: str, *, split: Split.ValueType = SPLIT_UNSPECIFIED, page_size: int = 0
) -> StreamFlow[Record]:
    """Go through the records of a READY version in row order."""
    request = api.ListRecordsRequest(
        parent=names.version(scope.project, name), split=split, page_size=page_size
    )
    return pages(scope, lambda stubs: stubs.data.ListRecords, request, lambda page: page.records)


def read_records(
    scope: Scope,
    name: str,
    *,
    split: Split.ValueType = SPLIT_UNSPECIFIED,
    start_row: int = 0,
    uid: str = "",
) -> StreamFlow[pyarrow.RecordBatch]:
    """Stream the records of a READY version as Arrow record batches. Needs pyarrow (extra `arrow`).

    Columns: row, record_id, split, filename, line, record (canonical JSON). `uid` is that of the version whose row
    `start_row` is, where another process saw it.
    """
    full = names.version(scope.project, name)
    return read_batches(
        scope,
        lambda stubs: stubs.data.ReadRecords,
        api.ReadRecordsRequest(name=full, split=split),
        (lambda stubs: stubs.data.GetDatasetVersion, api.GetDatasetVersionRequest(name=full)),
        Row(start_row=start_row, uid=uid),
    )


class Versions(SyncResource):
    """Dataset versions: immutable, split and checked bodies of records. Short names are `dataset/version`."""

    get = method(get_version)
    list = list_method(list_versions)
    cancel = method(cancel_version)
    delete = method(delete_version)
    undelete = method(undelete_version)
    purge = method(purge_version)
    watch = stream_method(watch_version)
    wait = method(wait_for_version)
    errors = list_method(list_errors)
    records = list_method(list_records)
    read = stream_method(read_records)


class Datasets(SyncResource):
    """Datasets and uploads."""

    create = method(create)
    get = method(get)
    delete = method(delete)
    undelete = method(undelete)
    purge = method(purge)
    list = list_method(list_all)
    upload = method(upload)
    get_upload = method(get_upload)
    list_uploads = list_method(list_uploads)
    cancel_upload = method(cancel_upload)
    delete_upload = method(delete_upload)
    undelete_upload = method(undelete_upload)
    purge_upload = method(purge_upload)
    create_version = method(create_version)

    def __init__(self, driver: SyncDriver) -> None:
        super().__init__(driver)
        self.versions = Versions(driver)


class AsyncVersions(AsyncResource):
    """Dataset versions: immutable, split and checked bodies of records. Short names are `dataset/version`."""

    get = async_method(get_version)
    list = async_stream_method(list_versions)
    cancel = async_method(cancel_version)
    delete = async_method(delete_version)
    undelete = async_method(undelete_version)
    purge = async_method(purge_version)
    watch = async_stream_method(watch_version)
    wait = async_method(wait_for_version)
    errors = async_stream_method(list_errors)
    records = async_stream_method(list_records)
    read = async_stream_method(read_records)


class AsyncDatasets(AsyncResource):
    """Datasets and uploads."""

    create = async_method(create)
    get = async_method(get)
    delete = async_method(delete)
    undelete = async_method(undelete)
    purge = async_method(purge)
    list = async_stream_method(list_all)
    upload = async_method(upload)
    get_upload = async_method(get_upload)
    list_uploads = async_stream_method(list_uploads)
    cancel_upload = async_method(cancel_upload)
    delete_upload = async_method(delete_upload)
    undelete_upload = async_method(undelete_upload)
    purge_upload = async_method(purge_upload)
    create_version = async_method(create_version)

    def __init__(self, driver: AsyncDriver) -> None:
        super().__init__(driver)
        self.versions = AsyncVersions(driver)
