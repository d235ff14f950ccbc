"""Stores by URLs: those that are known are opened, any other is refused with what would be right."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from luthier.errors import InvalidArgument
from luthier.storage import opening
from luthier.storage.dialect import file_of, url_of
from luthier.storage.migrations import upgrade
from luthier.storage.opening import (
    StoreUrls,
    blob_folder,
    folder_url,
    open_database,
    open_stores,
    store_urls,
)
from luthier.work import schema as work_schema

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


NAMES = ["plain", "with space", "50%", "a%20b", "a#b?c", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_the_url_of_a_folder_names_that_folder(tmp_path: Path, name: str) -> None:
    assert blob_folder(folder_url(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize("name", NAMES)
async def test_a_database_is_made_where_its_url_says_and_nowhere_else(tmp_path: Path, name: str) -> None:
    url = url_of(tmp_path / name / "a.db")
    assert file_of(url) == tmp_path / name / "a.db"
    upgrade(url, [work_schema.MIGRATIONS])
    database = open_database(url)
    await database.rows(text("SELECT 1"))
    await database.close()
    assert os.listdir(tmp_path) == [name]
    assert "a.db" in os.listdir(tmp_path / name)


REFUSED = {
    "": "one without a scheme",
    "/a/folder": "one without a scheme",
    "s3://bucket/prefix": "one of the scheme 's3': other stores are not supported",
    "{scheme}:{before}u:secret@h/a/b": "one ",
    "{scheme}://u:sec@ret@h/a": "one with a user, a host or a port",
    "{scheme}://host/a": "one with a user, a host or a port",
    "{scheme}://host:port/a": "one with a user, a host or a port",
    "{scheme}:{before}/a?mode=memory&uri=true": "one with a query or a fragment: a ? in a path is written %3F",
    "{scheme}:{before}/a#secret": "one with a query or a fragment",
    "{scheme}:relative": "one whose path is not absolute",
    "{scheme}://[secret": "one that cannot be read",
    "{scheme}:{before}/": "one whose path names nothing",
    "{scheme}:{before}/a%00b": "one whose path names nothing",
    "{scheme}:{before}/a\tb": "one that begins or ends with a space, or has a control character in it",
    " {scheme}:{before}/a": "one that begins or ends with a space",
    "{scheme}:{before}": "one whose path",
}
"""Templates of URLs that no store of this machine has, and what is said of them."""


@pytest.mark.parametrize(("template", "said"), REFUSED.items())
@pytest.mark.parametrize("kind", ["database", "blobs"])
def test_a_url_of_no_store_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, template: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    scheme, before = ("file", "//") if kind == "blobs" else ("sqlite+aiosqlite", "///")
    url = template.format(scheme=scheme, before=before)
    good = store_urls(tmp_path / "data")
    right = {
        "database": "database URL must be sqlite+aiosqlite:////path/of/a/file, got ",
        "blobs": "blob store URL must be file:///path/of/a/folder, got ",
    }[kind]
    with pytest.raises(InvalidArgument, match=re.escape(right + said)) as caught:
        open_stores(replace(good, database=url) if kind == "database" else replace(good, blobs=url), 0)
    assert "sec" not in caught.value.message
    assert list(tmp_path.iterdir()) == [], "nothing was made"


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite:///a.db",
        "sqlite+aiosqlite:///:memory:",
        "sqlite+aiosqlite:///file:m",
        "sqlite:////a",
    ],
)
def test_a_database_must_be_a_file_of_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match="database URL must be sqlite"):
        upgrade(url, [])
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
