"""Evaluations in SQL: nothing of a message is lost on the way, and progress stands apart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tests.storage.declared import declared
from tests.stores import database_url, open_database

from luthier.evaluation import schema
from luthier.evaluation.evaluations.repository import evaluations
from luthier.storage.database import Database
from luthier.storage.migrations import differences, upgrade
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate
from luthier.v1.evaluation_pb2 import Comparison, Evaluation
from luthier.v1.event_pb2 import Progress
from luthier.work import schema as work_schema

NAME = "projects/p/evaluations/e"
TOLD_BY_COLUMNS = ("uid", "create_time", "update_time", "delete_time", "purge_time", "etag")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = database_url(tmp_path / "e")
    upgrade(url, (work_schema.MIGRATIONS, schema.MIGRATIONS))
    assert differences(url, declared(work_schema.metadata, schema.metadata)) == []
    opened = open_database(tmp_path / "e")
    yield opened
    await opened.close()


def fill(message: Any, above: Sequence[str] = ()) -> Any:
    """Set every field of a message, however deep, to something other than its default.

    What holds messages of its own kind, as graders do, is filled once in itself: `above` are the kinds around it.
    """
    kinds = (*above, message.DESCRIPTOR.full_name)
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            fill_entry(getattr(message, field.name), field.message_type.fields_by_name["value"], kinds)
        elif field.message_type is not None:
            one = getattr(message, field.name)
            fill(one.add() if field.is_repeated else one, kinds)
        elif field.is_repeated:
            getattr(message, field.name).append(value_of(field))
        else:
            setattr(message, field.name, value_of(field))
    return message


def fill_entry(entries: Any, value: FieldDescriptor, kinds: Sequence[str]) -> None:
    if value.message_type is None:
        entries["k"] = value_of(value)
    elif kinds.count(value.message_type.full_name) < 2:
        fill(entries["k"], kinds)


def value_of(field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return {
        FieldDescriptor.CPPTYPE_STRING: b"b" if field.type == FieldDescriptor.TYPE_BYTES else "s",
        FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
        FieldDescriptor.CPPTYPE_BOOL: True,
    }.get(field.cpp_type, 7)


def without_columns(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    for field in TOLD_BY_COLUMNS:
        copy.ClearField(field)
    return copy


async def test_everything_of_an_evaluation_reads_back(database: Database) -> None:
    message, private = fill(Evaluation()), fill(EvaluationPrivate())
    message.name = NAME
    assert len(message.ListFields()) == len(Evaluation.DESCRIPTOR.fields)
    async with database.transaction() as connection:
        stored = await evaluations().insert(connection, message, private)
    for read in (stored, await evaluations().read(database, NAME)):
        assert without_columns(read.message) == without_columns(message)
        assert read.private == private
        assert (read.message.uid, read.message.etag) == (read.uid, '"1"')
        assert read.message.create_time == read.message.update_time


async def test_no_p_value_is_not_the_p_value_zero(database: Database) -> None:
    message = Evaluation(name=NAME, comparisons=[Comparison(), Comparison(p_value=0.0)])
    async with database.transaction() as connection:
        await evaluations().insert(connection, message, EvaluationPrivate())
    read = (await evaluations().read(database, NAME)).message
    assert [one.HasField("p_value") for one in read.comparisons] == [False, True]


async def test_progress_is_reported_without_a_revision_and_can_be_taken_away(database: Database) -> None:
    rows = evaluations()
    async with database.transaction() as connection:
        made = await rows.insert(connection, Evaluation(name=NAME, seed=3), EvaluationPrivate())
        changed = made.copy()
        changed.progress.CopyFrom(Progress(phase="arm zero", completed=2))
        changed.seed = 9
        reported = await rows.report(connection, made, changed)
        assert (reported.revision, reported.message.progress.completed) == (1, 2)
        assert reported.message.seed == 3, "a report changes nothing but progress"
        again = reported.copy()
        again.ClearField("progress")
        again.seed = 9
        updated = await rows.update(connection, reported, again)
    assert (updated.revision, updated.message.seed, updated.message.HasField("progress")) == (2, 9, False)
    assert (await rows.read(database, NAME)).message == updated.message
