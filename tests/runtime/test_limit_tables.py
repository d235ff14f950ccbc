"""The tables of limits of all families: each path is one of its message, and of a result no field is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from luthier.data.datasets import rules as datasets
from luthier.data.renderings import rules as renderings
from luthier.data.uploads import rules as uploads
from luthier.evaluation.aliases import rules as aliases
from luthier.evaluation.evaluations import result_rules as evaluation_results
from luthier.evaluation.evaluations import rules as evaluations
from luthier.evaluation.generation import rules as generation
from luthier.evaluation.grading import rules as grading
from luthier.grading import checks
from luthier.runtime.field_limits import ANY, LimitTable
from luthier.training.jobs import rules as jobs
from luthier.training.models import rules as models
from luthier.v1.data_service_pb2 import WriteUploadRequest
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import GenerateTextRequest, GradeSamplesRequest, ScoreTextsRequest
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.grader_pb2 import Grader
from luthier.v1.model_alias_pb2 import ModelAlias
from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import ExportModelRequest, MergeModelRequest
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.upload_pb2 import Upload
from luthier.work.results import CHECKPOINT_LIMITS, ROLLOUTS_LIMITS
from luthier.worker.v1.task_pb2 import TaskResult
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest, CommitRolloutsRequest

TABLES: Mapping[str, tuple[type[Message], LimitTable]] = {
    "datasets": (Dataset, datasets.DATASET_LIMITS),
    "versions": (DatasetVersion, datasets.VERSION_LIMITS),
    "renderings": (Rendering, renderings.LIMITS),
    "uploads": (Upload, uploads.UPLOAD_LIMITS),
    "chunks": (WriteUploadRequest, uploads.CHUNK_LIMITS),
    "jobs": (FineTuningJob, jobs.LIMITS),
    "references of jobs": (FineTuningJob, jobs.REFERENCES),
    "models": (Model, models.LIMITS),
    "merges": (MergeModelRequest, models.MAKING_LIMITS),
    "exports": (ExportModelRequest, models.MAKING_LIMITS),
    "evaluations": (Evaluation, evaluations.LIMITS),
    "generation": (GenerateTextRequest, generation.LIMITS),
    "texts to score": (ScoreTextsRequest, generation.TEXTS_LIMITS),
    "grading": (GradeSamplesRequest, grading.LIMITS),
    "aliases": (ModelAlias, aliases.LIMITS),
    "graders": (Grader, checks.LIMITS),
}
RESULTS: Mapping[str, LimitTable] = {
    "build_version": datasets.RESULT_LIMITS,
    "render": renderings.RESULT_LIMITS,
    "register_model": models.RESULT_LIMITS,
    "train": jobs.RESULT_LIMITS,
    "evaluate": evaluation_results.RESULT_LIMITS,
    "answer_share": evaluation_results.SHARE_LIMITS,
    "merge": models.MAKING_RESULT_LIMITS,
    "export": models.MAKING_RESULT_LIMITS,
}
KINDS: Mapping[str, FieldDescriptor] = {
    field.name: field for field in TaskResult.DESCRIPTOR.oneofs_by_name["result"].fields
}


def is_message(field: FieldDescriptor) -> bool:
    return field.message_type is not None and not field.message_type.GetOptions().map_entry


def is_field(descriptor: Any, path: str) -> bool:
    """Tell whether a path leads to a field of a message."""
    step, has_more, rest = path.partition(".")
    field = descriptor.fields_by_name.get(step.removesuffix("[]"))
    if field is None or (step.endswith("[]") and not field.is_repeated):
        return False
    if not has_more:
        return True
    is_one = field.is_repeated == step.endswith("[]")
    return is_one and field.message_type is not None and is_field(field.message_type, rest)


def unlisted(descriptor: Any, limits: LimitTable, prefix: str = "") -> Iterator[str]:
    """Yield the fields for which a table has no word, neither for the field nor for the message that holds it."""
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        if not is_message(field):
            if path not in limits:
                yield path
        elif field.is_repeated and path not in limits:
            yield path  # a list without measure
        elif limits.get(path) != ANY:
            inner = f"{path}[]." if field.is_repeated else f"{path}."
            yield from unlisted(field.message_type, limits, inner)


@pytest.mark.parametrize("name", TABLES)
def test_every_path_leads_to_a_field(name: str) -> None:
    message, limits = TABLES[name]
    assert [path for path in limits if not is_field(message.DESCRIPTOR, path)] == []


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_field_of_a_result_has_its_limit_and_every_limit_its_field(name: str) -> None:
    """A field that is new to a result is no worker's to say before somebody has said what it may be."""
    descriptor = KINDS[name].message_type
    assert [path for path in RESULTS[name] if not is_field(descriptor, path)] == []
    assert list(unlisted(descriptor, RESULTS[name])) == []


def test_every_field_of_a_checkpoint_has_its_limit_and_every_limit_its_field() -> None:
    descriptor: Any = CommitCheckpointRequest.DESCRIPTOR
    assert [path for path in CHECKPOINT_LIMITS if not is_field(descriptor, path)] == []
    assert list(unlisted(descriptor, CHECKPOINT_LIMITS)) == []


def test_every_field_of_rollouts_has_its_limit_and_every_limit_its_field() -> None:
    descriptor: Any = CommitRolloutsRequest.DESCRIPTOR
    assert [path for path in ROLLOUTS_LIMITS if not is_field(descriptor, path)] == []
    assert list(unlisted(descriptor, {**ROLLOUTS_LIMITS})) == []


def test_a_field_without_a_limit_is_found() -> None:
    limits = {path: limit for path, limit in RESULTS["render"].items() if not path.startswith("tokenizer.")}
    descriptor = KINDS["render"].message_type
    found = list(unlisted(descriptor, limits))
    assert found == ["tokenizer.path", "tokenizer.sha256", "tokenizer.size_bytes"]
    assert not is_field(Evaluation.DESCRIPTOR, "arms.num_shots")
    assert not is_field(Evaluation.DESCRIPTOR, "max_records[]")
    assert not is_field(Evaluation.DESCRIPTOR, "arms[].shots")
