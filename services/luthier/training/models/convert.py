"""Models between the wire and values."""

from __future__ import annotations

from dataclasses import asdict

from luthier.errors import InvalidArgument, Reason
from luthier.training.convert import set_time
from luthier.training.files import files_digest
from luthier.training.models.domain import (
    DirectorySource,
    GgufSource,
    HubSource,
    Model,
    ModelFile,
    ModelOutcome,
    Source,
)
from luthier.training.models.service import NewBaseModel
from luthier.v1 import model_pb2
from luthier.work.convert import failure_to_status
from luthier.worker.v1 import task_pb2


def new_base_model(message: model_pb2.Model) -> NewBaseModel:
    """Read what a caller asks for."""
    return NewBaseModel(
        source=_source_from_proto(message),
        display_name=message.display_name,
        labels=dict(message.labels),
    )


def _source_from_proto(message: model_pb2.Model) -> Source | None:
    match message.WhichOneof("source"):
        case "hub":
            return HubSource(repo_id=message.hub.repo_id, revision=message.hub.revision)
        case "directory":
            return DirectorySource(directory=message.directory)
        case "gguf_path":
            return GgufSource(gguf_path=message.gguf_path)
        case _:
            return None


def model_to_proto(model: Model) -> model_pb2.Model:
    """Write a model."""
    message = model_pb2.Model(
        name=model.name,
        uid=model.uid,
        display_name=model.display_name,
        labels=model.labels,
        state=model_pb2.Model.State.Value(f"STATE_{model.state}"),
        kind=model_pb2.Model.Kind.Value(f"KIND_{model.kind}"),
        base_model=model.base_model,
        fine_tuning_job=model.fine_tuning_job,
        step=model.step,
        digest=model.digest,
        tokenizer_digest=model.tokenizer_digest,
        architecture=model.architecture,
        num_parameters=model.num_parameters,
        context_length=model.context_length,
        has_chat_template=model.has_chat_template,
        eos_token_ids=model.eos_token_ids,
        warnings=model.warnings,
        etag=model.etag,
    )
    match model.source:
        case HubSource(repo_id=repo_id, revision=revision):
            message.hub.repo_id = repo_id
            message.hub.revision = revision
        case DirectorySource(directory=path):
            message.directory = path
        case GgufSource(gguf_path=path):
            message.gguf_path = path
    if model.taught is not None:
        message.taught.CopyFrom(model_pb2.Taught(**asdict(model.taught)))
    if model.failure is not None:
        message.error.CopyFrom(failure_to_status(model.failure))
    set_time(message.create_time, model.create_time)
    set_time(message.update_time, model.update_time)
    return message


def file_to_proto(file: ModelFile) -> model_pb2.ModelFile:
    """Write one file."""
    return model_pb2.ModelFile(
        path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, tokenizer=file.tokenizer
    )


def register_spec(model: Model) -> task_pb2.Task:
    """Say what to register."""
    spec = task_pb2.RegisterModelSpec()
    match model.source:
        case HubSource(repo_id=repo_id, revision=revision):
            spec.hub.repo_id = repo_id
            spec.hub.revision = revision
        case DirectorySource(directory=path):
            spec.directory = path
        case GgufSource(gguf_path=path):
            spec.gguf_path = path
        case None:
            raise AssertionError(f"{model.name} has no source to register")
    return task_pb2.Task(register_model=spec)


def outcome_from_proto(result: task_pb2.RegisterModelResult) -> ModelOutcome:
    """Read what a registration brought; the digests are computed here, over all files and the bundle.

    Raises:
        InvalidArgument: MODEL_INVALID; no weights or no tokenizer, or the bundle has another digest than the
            worker says.
    """
    files = tuple(
        ModelFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes, tokenizer=file.tokenizer)
        for file in sorted(result.files, key=lambda file: file.path)
    )
    tokenizer_digest = files_digest({file.path: file.sha256 for file in files if file.tokenizer})
    if not {file.tokenizer for file in files} >= {True, False}:
        raise InvalidArgument(
            f"a base model must have weights and a tokenizer, got {[file.path for file in files]}",
            reason=Reason.MODEL_INVALID,
        )
    if tokenizer_digest != result.tokenizer_digest:
        raise InvalidArgument(
            f"tokenizer_digest must be {tokenizer_digest}, got {result.tokenizer_digest!r}",
            reason=Reason.MODEL_INVALID,
        )
    return ModelOutcome(
        files=files,
        digest=files_digest({file.path: file.sha256 for file in files}),
        tokenizer_digest=tokenizer_digest,
        architecture=result.architecture,
        num_parameters=result.num_parameters,
        context_length=result.context_length,
        has_chat_template=result.has_chat_template,
        hub_commit=result.hub_commit,
        eos_token_ids=tuple(result.eos_token_ids),
        warnings=tuple(result.warnings),
    )
