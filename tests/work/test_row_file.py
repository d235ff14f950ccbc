"""Rows in a file that is read a page at a time, or from its beginning."""

from __future__ import annotations

import asyncio
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.stores import open_blobs

from luthier.errors import DataLoss, InvalidArgument, NotFound
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.work.row_file import RowFile, count_rows, found_rows, iterate_rows, read_rows, write_rows


@given(
    st.lists(st.binary(max_size=20), max_size=12), st.integers(0, 14), st.integers(1, 14), st.integers(0, 60)
)
def test_any_page_has_the_rows_that_fit(rows: list[bytes], first: int, limit: int, limit_bytes: int) -> None:
    async def read(folder: Path) -> list[bytes]:
        path = folder / "rows"
        assert write_rows(path, rows) == len(rows)
        blobs = MemoryBlobStore()
        blob = await blobs.put_bytes(path.read_bytes())
        file = await found_rows(blobs, blob.digest, len(rows), "rows")
        assert file.size_bytes == blob.size_bytes
        return await read_rows(blobs, file, first, limit, limit_bytes)

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(read(Path(folder)))
    wanted = rows[first : first + limit]
    assert found == wanted[: len(found)]
    assert sum(map(len, found[1:])) + len(b"".join(found[:1])) <= limit_bytes or len(found) == 1
    if len(found) < len(wanted):
        assert sum(map(len, wanted[: len(found) + 1])) > limit_bytes
    assert found or not wanted


@given(st.lists(st.binary(max_size=20), max_size=30))
def test_a_file_says_how_many_rows_it_has_and_gives_them_in_order(rows: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        write_rows(path, iter(rows))
        assert count_rows(path) == len(rows)
        assert list(iterate_rows(path)) == rows


def test_more_rows_than_offsets_are_read_at_once_come_in_order(tmp_path: Path) -> None:
    rows = [b"%d" % number for number in range(20_000)]
    write_rows(tmp_path / "rows", rows)
    assert list(iterate_rows(tmp_path / "rows")) == rows


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 8),
        struct.pack("<Q", 1),
        b"abc" + struct.pack("<2Q", 0, 4),
        b"abc" + struct.pack("<2Q", 0, 1 << 60),
    ],
)
def test_a_file_that_does_not_end_with_its_offsets_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(data)
    for read in (count_rows, lambda path: list(iterate_rows(path))):
        with pytest.raises(DataLoss, match=f"other of {len(data)} bytes does not end with the offsets"):
            read(path)


@pytest.mark.parametrize("offsets", [(1, 2, 3), (0, 3, 2, 3), (0, 9, 3), (0, 1 << 63, 3)])
def test_offsets_that_are_not_in_order_are_named(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    path = tmp_path / "bent"
    path.write_bytes(b"abc" + struct.pack(f"<{len(offsets)}Q", *offsets))
    with pytest.raises(DataLoss, match="the offsets of the rows of bent are not in order"):
        list(iterate_rows(path))


def written(path: Path, rows: list[bytes]) -> bytes:
    assert write_rows(path, rows) == len(rows)
    return path.read_bytes()


async def test_what_is_no_such_file_is_refused_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path / "blobs")
    data = written(tmp_path / "p", [b"a" * 10, b"bb", b"ccc"])
    file = await found_rows(blobs, (await blobs.put_bytes(data)).digest, 3, "rows")
    assert await read_rows(blobs, file, 1, 9, 100) == [b"bb", b"ccc"]
    for count in (-1, 0, 2, 4, 10**6):
        with pytest.raises(InvalidArgument, match=f"rows must be a file of {count} rows"):
            await found_rows(blobs, file.sha256, count, "rows")
    with pytest.raises(NotFound):
        await found_rows(blobs, "0" * 64, 3, "rows")
    bent = bytearray(data)
    bent[15 + 8] = 200
    blob = await blobs.put_bytes(bytes(bent))
    damaged = RowFile(sha256=blob.digest, size_bytes=file.size_bytes, num_rows=file.num_rows)
    with pytest.raises(DataLoss, match="are not in order"):
        await read_rows(blobs, damaged, 0, 3, 100)
