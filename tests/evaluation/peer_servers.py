"""A Data, a Model and a Training service, as far as the Evaluation service and its workers ask them."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow

from luthier.errors import NotFound
from luthier.runtime.digests import files_digest
from luthier.text.records import ChatRecord, Message, Record, record_id, record_to_json
from luthier.text.tokenizer import BUNDLE_FILES
from luthier.v1 import (
    arrow_pb2,
    data_service_pb2_grpc,
    dataset_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2_grpc,
)
from luthier.v1.base_precision_pb2 import BASE_PRECISION_UNSPECIFIED, BasePrecision

PROJECT = "projects/default"
VERSION = f"{PROJECT}/datasets/things/versions/v1"


def thing(number: int) -> ChatRecord:
    """A question whose answer is a JSON object."""
    answer = json.dumps({"colour": ("red", "green", "blue")[number % 3], "number": number})
    question = f"what colour has thing {number}?"
    return ChatRecord(
        messages=(Message(role="user", content=question), Message(role="assistant", content=answer))
    )


@dataclass
class DataServer(data_service_pb2_grpc.DataServiceServicer):
    """One dataset version, as the Data service serves it."""

    records: dict[str, list[Record]] = field(
        default_factory=lambda: {
            "TRAIN": [thing(number) for number in range(100, 108)],
            "TEST": [thing(number) for number in range(12)],
        }
    )
    num_texts_read: int = 0
    digest: str = "d" * 64

    async def GetDatasetVersion(self, request: Any, context: Any) -> dataset_pb2.DatasetVersion:  # noqa: N802
        if request.name != VERSION:
            raise NotFound(f"{request.name} does not exist")
        splits = [
            dataset_pb2.SplitStatistics(
                split=dataset_pb2.Split.Value(f"SPLIT_{name}"), num_records=len(found)
            )
            for name, found in self.records.items()
        ]
        return dataset_pb2.DatasetVersion(
            name=VERSION,
            uid=uid_of(VERSION),
            state=dataset_pb2.DatasetVersion.STATE_READY,
            digest=self.digest,
            statistics=dataset_pb2.DatasetStatistics(splits=splits),
        )

    async def ReadRecords(self, request: Any, context: Any) -> AsyncIterator[arrow_pb2.ArrowChunk]:  # noqa: N802
        wanted = dataset_pb2.Split.Name(request.split).removeprefix("SPLIT_")
        every = [
            (name, line, record)
            for name, found in self.records.items()
            for line, record in enumerate(found, start=1)
        ]
        rows = [
            (row, name, line, record)
            for row, (name, line, record) in enumerate(every)
            if name == wanted and row >= request.start_row
        ]
        for row, name, line, record in rows:
            columns: dict[str, list[Any]] = {
                "row": [row],
                "record_id": [record_id(record)],
                "split": [name],
                "filename": [f"{name.lower()}.jsonl"],
                "line": [line],
                "record": [record_to_json(record)],
            }
            if request.ids_only:
                columns = {name: columns[name] for name in ("row", "record_id")}
            else:
                self.num_texts_read += 1
            table = pyarrow.table(columns)
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            yield arrow_pb2.ArrowChunk(ipc=sink.getvalue().to_pybytes(), first_row=row, num_rows=1)


class ModelServer(model_service_pb2_grpc.ModelServiceServicer):
    """The tiny models, as the Training service serves them. `downloads` counts the files that were sent."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.downloads = 0
        self.states: dict[str, model_pb2.Model.State.ValueType] = {}
        self.eos_token_ids: dict[str, list[int]] = {}
        self.taught: dict[str, model_pb2.Taught] = {}
        self.precisions: dict[str, BasePrecision.ValueType] = {}
        self.tokenizers: dict[str, str] = {}
        self.bases: dict[str, str] = {}
        self.jobs: dict[str, str] = {}
        self.kinds: dict[str, model_pb2.Model.Kind.ValueType] = {}
        self.context_lengths: dict[str, int] = {}

    async def GetModel(self, request: Any, context: Any) -> model_pb2.Model:  # noqa: N802
        name = request.name.rsplit("/", 1)[-1]
        if name not in self.folders:
            raise NotFound(f"{request.name} does not exist")
        is_tuned = name.startswith("tuned")
        base = self.bases.get(name, "base")
        return model_pb2.Model(
            name=request.name,
            uid=uid_of(name),
            kind=self.kinds.get(
                name, model_pb2.Model.KIND_ADAPTER if is_tuned else model_pb2.Model.KIND_BASE
            ),
            state=self.states.get(name, model_pb2.Model.STATE_READY),
            digest=digest_of(self.folders[name]),
            base_model=f"{PROJECT}/models/{base}" if is_tuned else "",
            fine_tuning_job=self.jobs.get(name, ""),
            context_length=self.context_lengths.get(name, 0),
            has_chat_template=True,
            eos_token_ids=self.eos_token_ids.get(name, ()),
            taught=self.taught.get(name),
            base_precision=self.precisions.get(name, BASE_PRECISION_UNSPECIFIED),
            tokenizer_digest=""
            if is_tuned
            else self.tokenizers.get(name, tokenizer_digest(self.folders[name])),
        )

    async def ListModelFiles(self, request: Any, context: Any) -> Any:  # noqa: N802
        name = request.parent.rsplit("/", 1)[-1]
        if name not in self.folders:
            raise NotFound(f"{request.parent} does not exist")
        return model_service_pb2.ListModelFilesResponse(
            files=[
                model_pb2.ModelFile(
                    path=path, sha256=sha256, size_bytes=(self.folders[name] / path).stat().st_size
                )
                for path, sha256 in sorted(files_of(self.folders[name]).items())
            ]
        )

    async def DownloadModelFile(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.downloads += 1
        data = (self.folders[request.name.rsplit("/", 1)[-1]] / request.path).read_bytes()
        for offset in range(0, len(data), 1 << 20):
            part = data[offset : offset + (1 << 20)]
            yield model_service_pb2.DownloadModelFileResponse(offset=offset, data=part)


class TrainingServer(training_service_pb2_grpc.TrainingServiceServicer):
    """A Training service whose jobs are gone."""

    async def GetFineTuningJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound(f"{request.name} does not exist")


def uid_of(name: str) -> str:
    """Return the uid that a resource of the fixtures goes by."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def files_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of a model's files by their paths."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def digest_of(folder: Path) -> str:
    """Return the digest of a model that has the files of a folder."""
    return files_digest(files_of(folder))


def tokenizer_digest(folder: Path) -> str:
    """Return the digest of the tokenizer bundle of a folder."""
    return files_digest({path: sha256 for path, sha256 in files_of(folder).items() if path in BUNDLE_FILES})
