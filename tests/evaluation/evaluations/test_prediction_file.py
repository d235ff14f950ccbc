"""Rows in a file that is read a page at a time."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataLoss, InvalidArgument, NotFound
from luthier.evaluation.evaluations.prediction_file import (
    found_predictions,
    read_predictions,
    write_predictions,
)
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.stored.v1.evaluation_pb2 import PredictionFile


@given(
    st.lists(st.binary(max_size=20), max_size=12), st.integers(0, 14), st.integers(1, 14), st.integers(0, 60)
)
def test_any_page_has_the_rows_that_fit(rows: list[bytes], first: int, limit: int, limit_bytes: int) -> None:
    async def read(folder: Path) -> list[bytes]:
        path = folder / "predictions"
        assert write_predictions(path, rows) == len(rows)
        blobs = MemoryBlobStore()
        blob = await blobs.put_bytes(path.read_bytes())
        file = await found_predictions(blobs, blob.digest, len(rows))
        assert file.size_bytes == blob.size_bytes
        return await read_predictions(blobs, file, first, limit, limit_bytes)

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(read(Path(folder)))
    wanted = rows[first : first + limit]
    assert found == wanted[: len(found)]
    assert sum(map(len, found[1:])) + len(b"".join(found[:1])) <= limit_bytes or len(found) == 1
    if len(found) < len(wanted):
        assert sum(map(len, wanted[: len(found) + 1])) > limit_bytes
    assert found or not wanted


def written(path: Path, rows: list[bytes]) -> bytes:
    assert write_predictions(path, rows) == len(rows)
    return path.read_bytes()


async def test_what_is_no_such_file_is_refused_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path / "blobs")
    data = written(tmp_path / "p", [b"a" * 10, b"bb", b"ccc"])
    file = await found_predictions(blobs, (await blobs.put_bytes(data)).digest, 3)
    assert await read_predictions(blobs, file, 1, 9, 100) == [b"bb", b"ccc"]
    for count in (-1, 0, 2, 4, 10**6):
        with pytest.raises(InvalidArgument, match=f"must be a file of {count} rows"):
            await found_predictions(blobs, file.sha256, count)
    with pytest.raises(NotFound):
        await found_predictions(blobs, "0" * 64, 3)
    bent = bytearray(data)
    bent[15 + 8] = 200
    blob = await blobs.put_bytes(bytes(bent))
    with pytest.raises(DataLoss, match="are not in order"):
        await read_predictions(
            blobs,
            PredictionFile(sha256=blob.digest, size_bytes=file.size_bytes, num_rows=file.num_rows),
            0,
            3,
            100,
        )
