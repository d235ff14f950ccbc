"""Lives of bytes, from the first byte to an empty disk: each is gone on with from wherever a kill left it."""

from __future__ import annotations

from pathlib import Path

from tests.data.byte_site import site_in
from tests.data.data_life import data_life
from tests.data.evaluation_life import evaluation_life
from tests.data.training_life import training_life
from tests.work.collected import collect_later, digests_of

from luthier.storage import blob_refs
from luthier.storage.local_blobs import LocalBlobStore
from luthier.work import schema

LIVES = {"data": data_life, "training": training_life, "evaluation": evaluation_life}
EMPTY = (blob_refs.blob_refs, blob_refs.loose_blobs, schema.holds, schema.held_elsewhere)
"""Tables without a row once all is purged and collected."""


async def live(folder: Path, kind: str) -> None:
    """Live a life from wherever it is to its end: then there is nothing left."""
    async with site_in(folder, kind) as site:
        await LIVES[kind](site)
        await collect_later(site.database, site.blobs)
        assert await digests_of(site.blobs) == set(), "the disk comes back"
        for table in EMPTY:
            assert await site.count(table) == 0, f"{table.name} is empty"
    # Opened once more, which sweeps what a kill left aside.
    LocalBlobStore(folder / "blobs")
    left = [path.name for path in (folder / "blobs").rglob("*") if path.is_file()]
    assert left == [], "nothing is left beside blobs either"


async def check(folder: Path, kind: str) -> list[str]:
    """Return what is wrong with what a killed process left."""
    async with site_in(folder, kind) as site:
        return await site.faults()
