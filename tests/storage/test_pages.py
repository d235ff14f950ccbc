"""A page costs a page: how SQLite plans the lists of every family, and homes that were made before."""

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import sqlite
from tests.stored_pages import page_of

from luthier.data import schema as data_schema
from luthier.data.datasets import repository as datasets
from luthier.data.renderings import repository as renderings
from luthier.data.uploads import repository as uploads
from luthier.evaluation import schema as evaluation_schema
from luthier.evaluation.aliases import repository as aliases
from luthier.evaluation.evaluations import repository as evaluations
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.storage.pages import Cursor, parent_of
from luthier.storage.stored import Rows
from luthier.training import schema as training_schema
from luthier.training.jobs import repository as jobs
from luthier.training.jobs.service import FILTERS as JOB_FILTERS
from luthier.training.models import repository as models
from luthier.training.models.service import FILTERS as MODEL_FILTERS
from luthier.work import schema as work_schema


@dataclass(frozen=True)
class Family:
    name: str
    resources: Rows[Any, Any]
    migrations: Path
    filters: tuple[str, ...] = ("state", "labels")


FAMILIES = [
    Family("datasets", datasets.datasets(), data_schema.MIGRATIONS, ("labels",)),
    Family("dataset_versions", datasets.versions(), data_schema.MIGRATIONS),
    Family("uploads", uploads.uploads(), data_schema.MIGRATIONS),
    Family("renderings", renderings.renderings(), data_schema.MIGRATIONS),
    Family("models", models.models(), training_schema.MIGRATIONS, MODEL_FILTERS),
    Family("fine_tuning_jobs", jobs.jobs(), training_schema.MIGRATIONS, JOB_FILTERS),
    Family("evaluations", evaluations.evaluations(), evaluation_schema.MIGRATIONS),
    Family("model_aliases", aliases.aliases(), evaluation_schema.MIGRATIONS, ("labels",)),
]


def wanted(family: Family) -> Iterator[dict[str, str]]:
    """No filter, every one alone, and some together."""
    fields = ["labels.team" if field == "labels" else field for field in family.filters]
    yield {}
    for field in fields:
        yield {field: "x"}
    yield dict.fromkeys(fields, "x")
    yield {"labels.team": "x", "labels.tier": "y"}


def plan(
    database: Path, family: Family, equals: Mapping[str, str], *, newest_first: bool, deleted: bool = False
) -> list[str]:
    statement = family.resources.page_statement(
        parent="projects/p",
        limit=50,
        after=Cursor(create_time_us=1, name="projects/p/x/1"),
        equals=equals,
        newest_first=newest_first,
        deleted=deleted,
    )
    compiled = statement.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
    with sqlite3.connect(database) as connection:
        rows = connection.execute(f"EXPLAIN QUERY PLAN {compiled}").fetchall()
    connection.close()
    return [row[3] for row in rows]


@pytest.fixture
def migrated(tmp_path: Path, family: Family) -> Path:
    path = tmp_path / "a.db"
    upgrade(f"sqlite+aiosqlite:///{path}", [work_schema.MIGRATIONS, family.migrations])
    return path


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_list_follows_an_index_and_sorts_nothing(migrated: Path, family: Family) -> None:
    can_be_deleted = "delete_time_us" in family.resources.table.c
    for equals in wanted(family):
        for newest_first, deleted in product((True, False), (False, True) if can_be_deleted else (False,)):
            steps = plan(migrated, family, equals, newest_first=newest_first, deleted=deleted)
            assert steps
            assert not [step for step in steps if "SCAN" in step or "TEMP B-TREE" in step], (equals, steps)
            # The keyset bounds the walk: what comes before the page is not read.
            assert any("create_time_us" in step and "parent=?" in step for step in steps), (equals, steps)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_plan_test_notices_a_missing_index(migrated: Path, family: Family) -> None:
    with sqlite3.connect(migrated) as connection:
        connection.execute(f"DROP INDEX ix_{family.name}_page")
        connection.execute(f"DROP INDEX IF EXISTS ix_{family.name}_state")
    connection.close()
    steps = plan(migrated, family, {}, newest_first=True)
    assert [step for step in steps if "SCAN" in step or "TEMP B-TREE" in step], steps


async def test_a_home_made_before_lists_its_resources_by_label(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(data_schema.MIGRATIONS / "data_0001_initial.py", old)
    path = tmp_path / "a.db"
    url = f"sqlite+aiosqlite:///{path}"
    upgrade(url, [work_schema.MIGRATIONS, old])
    row = (
        "INSERT INTO datasets VALUES ('projects/p/datasets/{0}', 'projects/p', '{0}', 'ACTIVE', '{1}', {2}, 1, 1, "
        '\'{{"display_name": ""}}\')'
    )
    labels = ['{"team": "red", "n": "1"}', "{}", '{"team": "red"}', '{"team": "blue"}']
    with sqlite3.connect(path) as connection:
        for number, label in enumerate(labels):
            connection.execute(row.format(f"d{number}", label, number))
    connection.close()
    upgrade(url, [work_schema.MIGRATIONS, data_schema.MIGRATIONS])
    database = Database(url)
    async with database.reading() as reading:
        found = await page_of(datasets.datasets(), reading, "projects/p", 1, equals={"labels.team": "red"})
        assert [value.name[-2:] for value in found.values] == ["d2"]
        found = await page_of(
            datasets.datasets(), reading, "projects/p", 5, after=found.next, equals={"labels.team": "red"}
        )
        assert [value.name[-2:] for value in found.values] == ["d0"]
        counted = await reading.execute(text("SELECT count(*) FROM datasets_labels"))
        assert counted.scalar_one() == 4
    await database.close()


def test_parent_of_drops_the_last_collection_and_id() -> None:
    assert parent_of("projects/p/datasets/d/versions/v") == "projects/p/datasets/d"
    assert parent_of("projects/p") == ""
