"""No table of a service keeps rows of what was purged: each stands with a family, or says how its rows go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest
from sqlalchemy import MetaData

from luthier.data import schema as data_schema
from luthier.data.assembly import PURGED as DATA_PURGED
from luthier.evaluation import schema as evaluation_schema
from luthier.evaluation.purged import PURGED as EVALUATION_PURGED
from luthier.training import schema as training_schema
from luthier.training.assembly import PURGED as TRAINING_PURGED
from luthier.work import schema as work_schema
from luthier.work.purging import Purged

SERVICES: Mapping[str, tuple[MetaData, Sequence[Purged]]] = {
    "data": (data_schema.metadata, DATA_PURGED),
    "training": (training_schema.metadata, TRAINING_PURGED),
    "evaluation": (evaluation_schema.metadata, EVALUATION_PURGED),
}
OTHERWISE = {"staged_uploads": "with the staged bytes of an upload that is not there any more"}
OF_ALL = {
    "blob_refs": "of a resource and its parts, first",
    "tasks": "of a resource",
    "events": "of a resource",
    "deliveries": "of a resource",
    "holds": "of a resource, as their holder",
    "held_elsewhere": "once their holder has ended",
    "loose_blobs": "with their blobs",
    "request_log": "after their time",
    "database_identity": "never: it is the database's",
}
"""How rows go that every service has."""


@pytest.mark.parametrize("service", SERVICES)
def test_every_table_of_a_service_is_a_familys_or_a_part_of_one(service: str) -> None:
    metadata, purged = SERVICES[service]
    families = {one.rows.table.name for one in purged}
    labels = {f"{name}_labels" for name in families}
    parts = {column.table.name for one in purged for column in one.parts}
    assert not parts & families
    left = set(metadata.tables) - families - labels - parts
    assert left == OTHERWISE.keys() & set(metadata.tables)


@pytest.mark.parametrize("service", SERVICES)
def test_a_part_is_found_by_the_uid_that_its_key_begins_with(service: str) -> None:
    """Else a batch would look at the whole table."""
    found: Collection[tuple[str, str]] = {
        (column.table.name, column.name) for one in SERVICES[service][1] for column in one.parts
    }
    for one in SERVICES[service][1]:
        for column in one.parts:
            assert column is column.table.primary_key.columns[0], found
            assert column.name in ("owner", "job"), found


def test_every_table_that_all_services_have_says_how_its_rows_go() -> None:
    assert set(work_schema.metadata.tables) == OF_ALL.keys()
