from pathlib import Path

from sqlalchemy import MetaData
from tests.storage.declared import declared
from tests.stores import database_url

from luthier.data import schema
from luthier.storage.migrations import differences, upgrade
from luthier.work import schema as work_schema


def test_the_migrated_database_has_the_tables_that_the_code_declares(tmp_path: Path) -> None:
    url = database_url(tmp_path / "data")
    upgrade(url, [work_schema.MIGRATIONS, schema.MIGRATIONS])
    assert differences(url, declared(schema.metadata, work_schema.metadata)) == []
    missing = MetaData()
    schema.uploads.to_metadata(missing)
    assert differences(url, missing) != []
