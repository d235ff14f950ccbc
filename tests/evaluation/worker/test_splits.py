"""Records that an evaluation asks or shows, read from a real Data service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.data.conftest import Service

from luthier.evaluation.worker import splits
from luthier.evaluation.worker.questions import Question, choose
from luthier.evaluation.worker.splits import Splits
from luthier.v1 import dataset_pb2, evaluation_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

RECORDS = 1500
WIDE = "x" * 4000


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "home", {})
    await made.start()
    yield made
    await made.stop()


def lines(first: int, count: int) -> bytes:
    records = ({"prompt": f"{number} {WIDE}", "completion": "x"} for number in range(first, first + count))
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def context_of(service: Service, version: str) -> TaskContext:
    task = task_pb2.Task(
        evaluate=task_pb2.EvaluateSpec(evaluation=evaluation_pb2.Evaluation(dataset_version=version))
    )
    context = SimpleNamespace(token=service.keys.api_key, task=task, check=lambda: None)
    return cast(TaskContext, context)


async def test_few_records_are_read_without_the_text_of_the_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.worker():
        version = await service.version(
            lines(0, 2 * RECORDS), split_settings=dataset_pb2.SplitSettings(test_fraction=0.5)
        )
    context = context_of(service, version.name)
    texts: list[int] = []

    def counted(*arguments: Any) -> Iterator[Any]:
        for batch in read_batches(*arguments):
            texts.extend(batch.column("row").to_pylist() if "record" in batch.schema.names else ())
            yield batch

    def read(count: int, seed: int) -> list[Question]:
        texts.clear()
        return reader.read(context, dataset_pb2.SPLIT_TRAIN, count, seed)

    monkeypatch.setattr(splits, "read_batches", counted)
    with closing(Splits(service.address)) as reader:
        every = await asyncio.to_thread(read, 0, 0)
        assert len(every) == len(texts) == version.statistics.splits[0].num_records > RECORDS // 2
        for count, seed in product((1, 3, 8, 9), (0, 9)):
            assert await asyncio.to_thread(read, count, seed) == choose(every, count, seed)
            # A mebibyte, some 250 of these records, comes with each that is wanted, and is not read again.
            assert len(texts) <= min(300 * count, len(every))
