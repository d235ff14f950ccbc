"""Stores by URLs: those that are known are opened, any other is refused with what would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luthier.errors import InvalidArgument
from luthier.storage import opening
from luthier.storage.opening import StoreUrls, blob_folder, folder_url, open_stores, store_urls

DATABASE = "sqlite+aiosqlite:////tmp/a.db"


def test_a_service_keeps_its_state_below_its_folder_unless_urls_say_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert store_urls(folder) == StoreUrls(
        database=f"sqlite+aiosqlite:///{folder}/data.db",
        blobs=f"file://{folder}/blobs",
        staging=folder / "blobs" / "staging",
    )
    told = store_urls(folder, DATABASE, "file:///mnt/blobs")
    assert (told.database, told.blobs, told.staging) == (
        DATABASE,
        "file:///mnt/blobs",
        folder / "blobs" / "staging",
    )


async def test_stores_are_where_their_urls_say(tmp_path: Path) -> None:
    urls = store_urls(
        tmp_path / "data", f"sqlite+aiosqlite:///{tmp_path}/x/a.db", f"file://{tmp_path}/my%20blobs"
    )
    stores = open_stores(urls, 0)
    blob = await stores.blobs.put_bytes(b"abc")
    await stores.staging.append("k", 0, b"abc")
    assert await stores.staging.commit("k") == blob
    assert (tmp_path / "my blobs" / "blobs" / blob.digest[:2] / blob.digest).read_bytes() == b"abc"
    assert stores.database.disk.free_bytes() > 0
    assert (tmp_path / "x").is_dir()
    await stores.database.close()


@pytest.mark.parametrize("name", ["plain", "with space", "50%", "a#b?c", "ä"])
def test_the_url_of_a_folder_names_that_folder(tmp_path: Path, name: str) -> None:
    assert blob_folder(folder_url(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/prefix",
        "/a/folder",
        "file:relative",
        "file://host/a",
        "file:///a?x=1",
        "",
        "sqlite:///a",
        "file://",
    ],
)
def test_a_store_of_blobs_that_nobody_knows_is_refused_by_name(tmp_path: Path, url: str) -> None:
    urls = StoreUrls(database=f"sqlite+aiosqlite:///{tmp_path}/a.db", blobs=url, staging=tmp_path / "staging")
    wanted = f"blob store URL must be file:///path/of/a/folder, got {url!r}"
    with pytest.raises(InvalidArgument, match=re.escape(wanted)):
        open_stores(urls, 0)
    assert list(tmp_path.iterdir()) == [], "nothing was made"


@pytest.mark.parametrize("url", ["postgresql+psycopg://u:secret@h/d", "a.db", "", "sqlite:///a.db", "::"])
def test_a_database_that_nobody_knows_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    urls = StoreUrls(database=url, blobs=f"file://{tmp_path}/blobs", staging=tmp_path / "staging")
    with pytest.raises(InvalidArgument, match="database URL must be sqlite") as caught:
        open_stores(urls, 0)
    assert "secret" not in caught.value.message
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_adapters_are_chosen_here_alone() -> None:
    source = Path(opening.__file__).parents[1]
    makers = {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if re.search(r"\b(?:LocalBlobStore|LocalStaging|Database)\(", path.read_text())
    }
    assert makers <= {
        "storage/opening.py",
        "storage/local_blobs.py",
        "storage/local_staging.py",
        "storage/database.py",
    }
