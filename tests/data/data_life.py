"""A life of bytes in the Data service: an uploaded file, and versions that are built of it."""

from __future__ import annotations

import zlib
from contextlib import suppress
from hashlib import sha256

from sqlalchemy import select
from tests.data.byte_site import PARENT, Site
from tests.data.test_worker_results import built
from tests.work.collected import collect_later, digests_of, purge_later

from luthier.data import schema
from luthier.data.assembly import PURGED
from luthier.data.datasets.service import DatasetService
from luthier.data.datasets.servicer import BuildVersionHandler
from luthier.data.uploads.service import UploadService
from luthier.errors import AlreadyExists, NotFound
from luthier.storage.deleted import is_kept
from luthier.storage.local_staging import LocalStaging
from luthier.v1.data_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    StartUploadRequest,
    WriteUploadRequest,
)
from luthier.v1.dataset_pb2 import DatasetSource, DatasetVersion
from luthier.v1.upload_pb2 import Upload
from luthier.work.keeping import Keeping
from luthier.work.tasks import TaskKind

DATASET = f"{PARENT}/datasets/d"
LINES = b'{"prompt": "a", "completion": "b"}\n'
ROWS = b"the rows of every version, which are the same"


async def data_life(site: Site) -> None:
    """A file is uploaded, two versions with the same rows are built of it, and all goes again."""
    staging = LocalStaging(site.folder / "blobs" / "staging", site.blobs)
    uploads = UploadService(site.database, staging, 1 << 20, Keeping())
    datasets = DatasetService(site.database, site.log, site.queue, uploads, Keeping())
    site.queue.register(TaskKind.BUILD_VERSION, BuildVersionHandler(datasets))
    await uploads.finish_left()
    await site.queue.recover()
    # What a service does at once when it starts, however long it was away.
    await collect_later(site.database, site.blobs)
    with suppress(AlreadyExists):
        await datasets.create_dataset(CreateDatasetRequest(parent=PARENT, dataset_id="d"))
    for version in ("v1", "v2"):
        if not site.is_past(version):
            await build(site, datasets, uploads, version)
            site.note(version)
    for version in ("v1", "v2"):
        with suppress(NotFound):
            await datasets.versions.delete(f"{DATASET}/versions/{version}", "")
        await collect_later(site.database, site.blobs)
        if await site.count(schema.dataset_versions, is_kept(schema.dataset_versions)):
            assert sha256(ROWS).hexdigest() in await digests_of(site.blobs), "who is deleted needs them too"
    for name in await live_uploads(site):
        await uploads.delete(name, "")
    await uploads.finish_left()
    await purge_later(site.database, PURGED)


async def build(site: Site, datasets: DatasetService, uploads: UploadService, version: str) -> None:
    """Bring a version to its end from wherever it is."""
    name = f"{DATASET}/versions/{version}"
    try:
        state = (await datasets.versions.read(name)).message.state
    except NotFound:
        upload = await uploaded(uploads, site)
        wanted = DatasetVersion(sources=[DatasetSource(upload=upload)])
        request = CreateDatasetVersionRequest(
            parent=DATASET, dataset_version=wanted, dataset_version_id=version
        )
        state = (await datasets.create_version(request)).state
    if state != DatasetVersion.STATE_READY:
        task = await site.claim(TaskKind.BUILD_VERSION)
        source = task.build_version.sources[0].file
        read = [piece async for piece in site.blobs.read(source.sha256)]
        assert b"".join(read) == LINES, "what is to be built from is there"
        file = await site.send(task, ROWS)
        await site.call("FinishTask", task=task.task, epoch=task.epoch, result=built(file.sha256))


async def uploaded(uploads: UploadService, site: Site) -> str:
    """Upload the file from wherever that is; return the upload's name."""
    names = await live_uploads(site)
    name = names[0] if names else (await start(uploads)).name
    upload = await uploads.get(name)
    half = len(LINES) // 2
    while upload.state != Upload.STATE_COMPLETE:
        offset = upload.persisted_size_bytes
        data = LINES[:half] if offset == 0 else LINES[offset:]
        chunk = WriteUploadRequest(
            name=name,
            offset=offset,
            data=data,
            crc32=zlib.crc32(data),
            finish=offset + len(data) == len(LINES),
        )
        upload = await uploads.write(name, chunk)
    return name


async def start(uploads: UploadService) -> Upload:
    return await uploads.start(StartUploadRequest(parent=PARENT, upload=Upload(filename="a.jsonl")))


async def live_uploads(site: Site) -> list[str]:
    uploads = schema.uploads.c
    async with site.database.reading() as connection:
        found = await connection.execute(select(uploads.name).where(uploads.delete_time_us.is_(None)))
        return list(found.scalars())
