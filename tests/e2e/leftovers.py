"""What lies on the disk of a home whose services have ended, once all went that goes by itself after a while."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sqlalchemy import select
from tests.stores import SERVICES, service_urls
from tests.work.collected import collect_later

from luthier.data.schema import staged_uploads
from luthier.storage.blob_refs import blob_refs
from luthier.storage.blobs import MARK_NAME
from luthier.storage.opening import blob_folder, open_blobs, open_stores, store_urls


async def left_over(home: Path) -> list[str]:
    """The files of each service that nothing needs, however its processes were killed, and what is needed and gone.

    A service is opened as it opens itself, which sweeps what writers left that are gone.
    """
    return [one for service in SERVICES for one in await _left_of(home, service)]


async def _left_of(home: Path, service: str) -> list[str]:
    urls = store_urls(home / service, **service_urls(home, service))
    stores = open_stores(urls, 0)
    try:
        await collect_later(stores.database, stores.blobs)
        # What was collected goes a while after it was set aside; opened anew, the store has done with it.
        open_blobs(urls.blobs)
        needed = {row["digest"] for row in await stores.database.rows(select(blob_refs.c.digest))}
        if service == "data":
            uids = [row["uid"] for row in await stores.database.rows(select(staged_uploads.c.uid))]
            staged = {hashlib.sha256(uid.encode()).hexdigest() for uid in uids}
        else:
            staged = set()
    finally:
        await stores.database.close()
    folders = {blob_folder(urls.blobs), urls.staging}
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    there = {path.name for path in files if path.name != MARK_NAME and path.stem not in staged}
    wrong = {"needed by nothing": there - needed, "needed and gone": needed - there}
    return [f"{service}: {name} is {what}" for what, names in wrong.items() for name in sorted(names)]
