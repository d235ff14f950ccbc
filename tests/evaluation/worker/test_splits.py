"""Records that an evaluation asks or shows, read from a real Data service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from tests.data.conftest import PROJECT, Service

from luthier.errors import AlreadyExists, DataLoss, FailedPrecondition, NotFound, Reason
from luthier.evaluation.worker import splits
from luthier.evaluation.worker.questions import Question, choose
from luthier.evaluation.worker.splits import Splits
from luthier.text.records import ChatRecord, CompletionRecord
from luthier.v1 import data_service_pb2, dataset_pb2, evaluation_pb2
from luthier.work.arrow_stream import Open, read_batches
from luthier.work.context import TaskContext
from luthier.work.retry import Messages
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


def context_of(service: Service, version: dataset_pb2.DatasetVersion) -> TaskContext:
    evaluation = evaluation_pb2.Evaluation(dataset_version=version.name, dataset_digest=version.digest)
    task = task_pb2.Task(evaluate=task_pb2.EvaluateSpec(evaluation=evaluation))
    context = SimpleNamespace(token=service.keys.api_key, task=task, check=lambda: None)
    return cast(TaskContext, context)


async def test_few_records_are_read_without_the_text_of_the_others(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.worker():
        version = await service.version(
            lines(0, 2 * RECORDS), split_settings=dataset_pb2.SplitSettings(test_fraction=0.5)
        )
    context = context_of(service, version)
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


async def made_again(service: Service, data: bytes) -> dataset_pb2.DatasetVersion:
    """Build a version named news/v1 in place of one that is deleted."""
    name = f"{PROJECT}/datasets/news/versions/v1"
    with suppress(NotFound):
        await service.call("DeleteDatasetVersion", data_service_pb2.DeleteDatasetVersionRequest(name=name))
    with suppress(AlreadyExists):
        await service.call(
            "CreateDataset",
            data_service_pb2.CreateDatasetRequest(
                parent=PROJECT, dataset_id="news", dataset=dataset_pb2.Dataset()
            ),
        )
    source = dataset_pb2.DatasetSource(upload=await service.uploaded(data), split=dataset_pb2.SPLIT_TEST)
    request = data_service_pb2.CreateDatasetVersionRequest(
        parent=f"{PROJECT}/datasets/news",
        dataset_version=dataset_pb2.DatasetVersion(sources=[source]),
        dataset_version_id="v1",
    )
    await service.call("CreateDatasetVersion", request)
    await service.stream("WatchDatasetVersion", data_service_pb2.WatchDatasetVersionRequest(name=name))
    found: dataset_pb2.DatasetVersion = await service.call(
        "GetDatasetVersion", data_service_pb2.GetDatasetVersionRequest(name=name)
    )
    return found


@pytest.mark.parametrize("count", [0, 3])
async def test_a_name_that_means_another_version_by_now_is_refused(service: Service, count: int) -> None:
    async with service.worker():
        first = await made_again(service, lines(0, 20))
        second = await made_again(service, lines(20, 20))
    assert first.name == second.name
    assert first.digest != second.digest
    with closing(Splits(service.address)) as reader:
        read = partial(reader.read, split=dataset_pb2.SPLIT_TEST, count=count, seed=0)
        with pytest.raises(DataLoss, match="was deleted and its name used again") as caught:
            await asyncio.to_thread(read, context_of(service, first))
        wanted, found = first.digest, second.digest
        assert caught.value.metadata == {"name": first.name, "expected": wanted, "actual": found}
        assert len(await asyncio.to_thread(read, context_of(service, second))) == (count or 20)


async def test_a_stream_that_breaks_off_does_not_go_on_in_another_version(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.worker():
        first = await made_again(service, lines(0, 2 * RECORDS))
    loop = asyncio.get_running_loop()
    taken: list[int] = []

    async def replace() -> None:
        async with service.worker():
            await made_again(service, lines(RECORDS, 2 * RECORDS))

    def broken_once(open_at: Open, *arguments: Any) -> Iterator[Any]:
        def opened(row: int) -> Messages[Any]:
            call = open_at(row)
            return call if row else cast(Messages[Any], _BreaksAfterOne(call))

        for batch in read_batches(opened, *arguments):
            if not taken:
                asyncio.run_coroutine_threadsafe(replace(), loop).result(60)
            taken.extend(batch.column("row").to_pylist())
            yield batch

    monkeypatch.setattr(splits, "read_batches", broken_once)
    with closing(Splits(service.address)) as reader, pytest.raises(DataLoss, match="name used again"):
        await asyncio.to_thread(reader.read, context_of(service, first), dataset_pb2.SPLIT_TEST, 0, 0)
    assert 0 < len(taken) < 2 * RECORDS, "it broke off between two chunks"


class _Broken(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the line broke"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class _BreaksAfterOne:
    """A stream whose line breaks after its first message."""

    def __init__(self, call: Messages[Any]) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Any]:
        yield next(iter(self._call))
        self._call.cancel()
        raise _Broken

    def cancel(self) -> object:
        return self._call.cancel()


async def test_of_a_pair_the_chosen_answer_is_right_and_undesirable_ones_are_refused(
    service: Service,
) -> None:
    def side(content: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": content}]

    asked = [{"role": "user", "content": "q"}]
    pair = {"prompt": asked, "chosen": side("good"), "rejected": side("bad")}
    labelled = [
        {"prompt": f"p{number}:", "completion": f" {number}", "label": number != 1} for number in range(3)
    ]
    async with service.worker():
        pairs = await service.version(json.dumps(pair).encode())
        labels = await service.version(b"\n".join(json.dumps(one).encode() for one in labelled))
        good = await service.version(json.dumps(labelled[0]).encode())
    with closing(Splits(service.address)) as reader:
        read = partial(reader.read, split=dataset_pb2.SPLIT_TRAIN, count=0, seed=0)
        (question,) = await asyncio.to_thread(read, context_of(service, pairs))
        assert isinstance(question.record, ChatRecord)
        assert [message.content for message in question.record.messages] == ["q", "good"]
        (question,) = await asyncio.to_thread(read, context_of(service, good))
        assert question.record == CompletionRecord(prompt="p0:", completion=" 0", label=True)
        with pytest.raises(FailedPrecondition) as caught:
            await asyncio.to_thread(read, context_of(service, labels))
    assert caught.value.reason == Reason.INVALID_FIELD
    assert caught.value.message == (
        "1 of 3 records have nothing to compare an answer with, the first is 0.jsonl:2: must have an answer that is "
        "right, got one labelled undesirable; evaluate on a version whose answers are right"
    )
    assert caught.value.metadata == {"filename": "0.jsonl", "line": "2"}
