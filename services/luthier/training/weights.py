"""What both families call a model: one that is stored, or a checkpoint that is seen as one."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.v1.model_pb2 import Model, ModelFile
from luthier.worker.v1.task_pb2 import BlobFile

StoredModel = Stored[Model, ModelPrivate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a tuned model's files are made of besides those that its job brings.

    Attributes:
        base_uid: uid of its base model.
        has_own_template: whether the template that was taught is the base's own.
        generation_config: the file that says where answers end; None: the base's own with all weights, none with an
            adapter.
    """

    base_uid: str
    has_own_template: bool
    generation_config: ModelFile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenModel:
    """A model and its files, of which none is stored as a model."""

    uid: str
    message: Model
    private: ModelPrivate


def weight_files(model: StoredModel | SeenModel) -> list[BlobFile]:
    """Return the files of a model besides those of its tokenizer."""
    return [
        BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        for file in model.private.files
        if not file.tokenizer
    ]
