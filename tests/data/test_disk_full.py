"""The Data service on a disk with little room: refused by name, and what makes room works."""

from __future__ import annotations

import asyncio
import gc
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import MODEL, PROJECT, Service
from tests.small_disk import fill, fill_again, mounted, taken

from luthier.errors import Reason, ResourceExhausted
from luthier.storage.disk import Disk
from luthier.v1 import data_service_pb2, dataset_pb2, rendering_pb2, upload_pb2

MIB = 1 << 20
FLOOR = 6 * MIB


@pytest.fixture
async def small(tmp_path: Path, bundle_files: dict[str, bytes]) -> AsyncIterator[Service]:
    """A service whose home has 16 MiB, six of which must stay free."""
    with mounted(tmp_path / "small") as folder:
        service = Service(folder / "home", bundle_files)
        service.min_free_bytes = FLOOR
        await service.start()
        yield service
        await service.stop()


async def started(service: Service) -> Any:
    request = data_service_pb2.StartUploadRequest(
        parent=PROJECT, upload=upload_pb2.Upload(filename="a.jsonl")
    )
    return await service.call("StartUpload", request)


def chunks(name: str, offset: int, number: int) -> AsyncIterator[Any]:
    async def sent() -> AsyncIterator[Any]:
        data = bytes(MIB)
        for index in range(number):
            yield data_service_pb2.WriteUploadRequest(
                name=name, offset=offset + index * MIB, data=data, crc32=zlib.crc32(data)
            )

    return sent()


async def refused(service: Service, method: str, request: Any) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as caught:
        await service.call(method, request)
    assert caught.value.reason == Reason.DISK_FULL, caught.value
    return caught.value


async def test_an_upload_stops_at_the_floor_and_cancelling_it_makes_room(small: Service) -> None:
    async with small.worker():
        version = await small.version(b'{"prompt": "q", "completion": "a"}\n')
    upload = await started(small)
    stored = 0
    while Disk(small.home).free_bytes() >= FLOOR:
        stored = (await small.call("WriteUpload", chunks(upload.name, stored, 1))).persisted_size_bytes
    error = await refused(small, "WriteUpload", chunks(upload.name, stored, 1))
    assert "6.0 MiB must stay free" in error.message
    get = data_service_pb2.GetUploadRequest(name=upload.name)
    assert (await small.call("GetUpload", get)).persisted_size_bytes == stored
    assert 4 * MIB <= stored <= 10 * MIB
    # Everything new is refused, before anything of it is stored.
    wanted = dataset_pb2.DatasetVersion(sources=[dataset_pb2.DatasetSource(upload=upload.name)])
    await refused(
        small,
        "StartUpload",
        data_service_pb2.StartUploadRequest(parent=PROJECT, upload=upload_pb2.Upload(filename="b.jsonl")),
    )
    await refused(
        small,
        "CreateDatasetVersion",
        data_service_pb2.CreateDatasetVersionRequest(
            parent=version.name.partition("/versions/")[0], dataset_version=wanted
        ),
    )
    await refused(
        small,
        "CreateRendering",
        data_service_pb2.CreateRenderingRequest(
            parent=PROJECT, rendering=rendering_pb2.Rendering(dataset_version=version.name, model=MODEL)
        ),
    )
    # What is there can be read, and what makes room works.
    assert (await small.call("ListRecords", data_service_pb2.ListRecordsRequest(parent=version.name))).records
    cancelled = await small.call("CancelUpload", data_service_pb2.CancelUploadRequest(name=upload.name))
    assert cancelled.state == upload_pb2.Upload.STATE_CANCELLED
    async with asyncio.timeout(10):
        while not Disk(small.home, FLOOR).has_room():  # noqa: ASYNC110 - it is cleared away after the answer
            await asyncio.sleep(0.02)
    again = await started(small)
    assert again.state == upload_pb2.Upload.STATE_RECEIVING


async def test_an_upload_goes_on_where_it_stopped_once_there_is_room(small: Service) -> None:
    upload = await started(small)
    await small.call("WriteUpload", chunks(upload.name, 0, 2))
    filler = fill(small.home, leave_bytes=FLOOR - MIB)
    await refused(small, "WriteUpload", chunks(upload.name, 2 * MIB, 1))
    filler.unlink()
    assert Disk(small.home).free_bytes() > FLOOR
    more = await small.call("WriteUpload", chunks(upload.name, 2 * MIB, 1))
    assert more.persisted_size_bytes == 3 * MIB


async def test_a_disk_that_others_fill_is_named_too_and_never_internal(small: Service) -> None:
    upload = await started(small)
    filler = fill(small.home)
    with pytest.raises(ResourceExhausted) as caught:  # noqa: PT012 - some fit into what the log has already
        for number in range(40):
            dataset = data_service_pb2.CreateDatasetRequest(parent=PROJECT, dataset_id=f"d{number}")
            await small.call("CreateDataset", dataset)
    assert caught.value.reason == Reason.DISK_FULL
    assert (await small.call("GetUpload", data_service_pb2.GetUploadRequest(name=upload.name))).uid
    filler.unlink()
    await small.call("CancelUpload", data_service_pb2.CancelUploadRequest(name=upload.name))


async def test_cancelling_works_on_a_disk_that_others_filled(
    tmp_path: Path, bundle_files: dict[str, bytes]
) -> None:
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    with mounted(tmp_path / "roomy", 128) as folder:
        service = Service(folder / "home", bundle_files)
        service.min_free_bytes = 64 * MIB
        await service.start()
        uploads = [await started(service) for _ in range(40)]
        for upload in uploads:
            await service.call("WriteUpload", chunks(upload.name, 0, 1))
        filler = fill(folder)
        assert Disk(folder).free_bytes() == 0
        # What does not make room gets none of what is kept for what does, however often it asks.
        for number in range(50):
            dataset = data_service_pb2.CreateDatasetRequest(parent=PROJECT, dataset_id=f"d{number}")
            await refused(service, "CreateDataset", dataset)
        for upload in uploads:
            cancel = data_service_pb2.CancelUploadRequest(name=upload.name)
            cancelled = await service.call("CancelUpload", cancel)
            assert cancelled.state == upload_pb2.Upload.STATE_CANCELLED
            fill_again(folder)
        filler.unlink()
        (folder / "filler-2").unlink()
        await service.call("CreateDataset", dataset)
        await service.stop()
    gc.collect()
    assert not unheard, "what is cleared away behind a cancel finds room, too"


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A disk with more than the least floor that keeps room for cancelling."""
    with mounted(tmp_path / "roomy", 96) as folder:
        yield folder


@asynccontextmanager
async def keeping_room(home: Path, bundle_files: dict[str, bytes]) -> AsyncIterator[Service]:
    """A service with a floor that keeps room for cancelling."""
    service = Service(home, bundle_files)
    service.min_free_bytes = 64 * MIB
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


def kept_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*-kept-*"))


async def make_work(service: Service) -> list[tuple[str, Any]]:
    """Uploads in progress, renderings that no worker takes, datasets: and the calls that end each of them."""
    async with service.worker():
        version = await service.version(b'{"prompt": "q", "completion": "a"}\n')
    calls: list[tuple[str, Any]] = []
    for number in range(10):
        upload = await started(service)
        calls.append(("CancelUpload", data_service_pb2.CancelUploadRequest(name=upload.name)))
        rendering = rendering_pb2.Rendering(dataset_version=version.name, model=MODEL)
        request = data_service_pb2.CreateRenderingRequest(parent=PROJECT, rendering=rendering)
        made = await service.call("CreateRendering", request)
        calls.append(("CancelRendering", data_service_pb2.CancelRenderingRequest(name=made.name)))
        dataset = data_service_pb2.CreateDatasetRequest(parent=PROJECT, dataset_id=f"d{number}")
        made = await service.call("CreateDataset", dataset)
        calls.append(("DeleteDataset", data_service_pb2.DeleteDatasetRequest(name=made.name)))
    return calls


async def require_all_end(service: Service, calls: list[tuple[str, Any]]) -> None:
    """See that all that makes room works on a disk without any, and nothing else."""
    assert Disk(service.home).free_bytes() == 0
    await refused(service, "CreateDataset", data_service_pb2.CreateDatasetRequest(parent=PROJECT))
    for method, request in calls:
        ended = await service.call(method, request)
        assert "CANCELLED" in str(ended) or ended.HasField("delete_time"), ended
    assert Disk(service.home).free_bytes() == 0


async def test_cancelling_and_deleting_work_after_restarts_on_a_full_disk(
    roomy: Path, bundle_files: dict[str, bytes]
) -> None:
    async with keeping_room(roomy / "home", bundle_files) as service:
        calls = await make_work(service)
        await service.stop()
        await service.start()
        fill(roomy)
        with taken(roomy):
            for part in (calls[:15], calls[15:]):
                await service.stop()
                await service.start()
                await require_all_end(service, part)


async def test_cancelling_and_deleting_work_after_a_kill_on_a_full_disk(
    roomy: Path, tmp_path: Path, bundle_files: dict[str, bytes]
) -> None:
    async with keeping_room(tmp_path / "home", bundle_files) as service:
        calls = await make_work(service)
        # What a killed service leaves; by another process, as this one's locks on a file would go with its descriptor.
        copied = await asyncio.create_subprocess_exec("cp", "-a", str(service.home), str(roomy))
        assert await copied.wait() == 0
    fill(roomy)
    with taken(roomy):
        async with keeping_room(roomy / "home", bundle_files) as service:
            await require_all_end(service, calls[:15])
            await service.stop()
            await service.start()
            await require_all_end(service, calls[15:])


async def test_a_lower_floor_gives_back_what_was_kept(roomy: Path, bundle_files: dict[str, bytes]) -> None:
    async with keeping_room(roomy / "home", bundle_files) as service:
        await service.stop()
        assert kept_in(roomy) == ["data.db-kept-shm", "data.db-kept-wal"]
        service.min_free_bytes = FLOOR
        await service.start()
        assert kept_in(roomy) == []
