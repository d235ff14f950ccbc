"""The stores of the tests themselves: where templates of URLs say, and made by no other way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests import stores

from luthier.errors import InvalidArgument
from luthier.storage.opening import store_urls

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"\b(?:LocalBlobStore|LocalStaging|Database)\(|sqlite\+aiosqlite:")
OF_ADAPTERS = {
    "daemon/test_fsck.py": "breaks files of a local store",
    "daemon/test_start_failures.py": "gives services URLs that cannot be",
    "data/byte_lives.py": "is killed at each call of the system that the local stores make",
    "data/byte_site.py": "is killed at each call of the system that the local stores make",
    "data/data_life.py": "is killed at each call of the system that the local stores make",
    "data/killed_life.py": "is killed at each call of the system that the local stores make",
    "evaluation/test_migrations.py": "begins with a database of SQLite that former code made",
    "data/test_migrations.py": "begins with a database of SQLite that former code made",
    "golden/test_purging.py": "counts the tables, pages and files of local stores",
    "runtime/test_home.py": "looks at the modes of files",
    "stores.py": "has the templates",
    "training/test_migration.py": "begins with a database of SQLite that former code made",
    "work/test_collecting.py": "ages blobs by the times of their files",
    "work/test_measured_blobs.py": "fills and breaks a local store",
    "work/test_schema.py": "begins with a database of SQLite that former code made",
}
"""Tests of one adapter, or of what others made of it; so are those of `storage`."""


def test_stores_are_where_services_have_them_unless_templates_say_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores.Chosen, "templates", stores.Templates())
    urls = store_urls(tmp_path / "data")
    assert stores.service_urls(tmp_path, "data") == {"database_url": urls.database, "blobs_url": urls.blobs}
    assert stores.environment(tmp_path)["LUTHIER_DATA_DATABASE_URL"] == urls.database
    assert len(stores.environment(tmp_path)) == 6


def test_templates_name_a_place_of_each_tests_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores.Chosen, "templates", stores.Templates())
    stores.use(f"sqlite+aiosqlite:///{tmp_path}/all/{{name}}.db", f"file://{tmp_path}/all/{{path}}/x")
    one, other = stores.database_url(tmp_path / "a"), stores.database_url(tmp_path / "b")
    assert re.fullmatch(rf"sqlite\+aiosqlite:///{tmp_path}/all/t[0-9a-f]{{16}}\.db", one)
    assert one != other
    assert stores.blobs_url(tmp_path / "a b") == f"file://{tmp_path}/all/{tmp_path}/a%20b/x"


@pytest.mark.parametrize(
    ("database", "blobs", "problem"),
    [
        (
            "postgresql+psycopg://h/{name}",
            "",
            "database URL must be sqlite+aiosqlite:////path/of/a/file, got one of the scheme 'post",
        ),
        (
            "",
            "s3://bucket/{name}",
            "blob store URL must be file:///path/of/a/folder, got one of the scheme 's3'",
        ),
        ("sqlite+aiosqlite:////tmp/one.db", "", "--database-url must have {path} or {name} in it, got"),
        ("", "file:///tmp/one", "--blobs-url must have {path} or {name} in it, got"),
    ],
)
def test_a_template_that_nobody_can_open_is_refused_with_those_that_are_known(
    database: str, blobs: str, problem: str
) -> None:
    before = stores.Chosen.templates
    with pytest.raises(InvalidArgument, match=re.escape(problem)):
        stores.use(database, blobs)
    assert stores.Chosen.templates is before


def test_pytest_says_so_before_any_test_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/storage/test_files.py"]
    unknown = subprocess.run(
        [*command, "--blobs-url", "s3://bucket/{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert unknown.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        "ERROR: blob store URL must be file:///path/of/a/folder, got one of the scheme 's3'" in unknown.stderr
    )


def test_no_test_but_an_adapters_makes_a_store_by_another_way() -> None:
    folder = ROOT / "tests"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if MADE.search(path.read_text())}
    elsewhere = {path for path in found if not path.startswith("storage/")}
    assert elsewhere == OF_ADAPTERS.keys()
