"""Models in SQL."""

from __future__ import annotations

from luthier.storage.stored import Rows
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training import schema
from luthier.v1.model_pb2 import Model


def models() -> Rows[Model, ModelPrivate]:
    """Return the stored models."""
    return Rows(
        schema.models,
        Model,
        ModelPrivate,
        columns={
            "kind": lambda model, _: Model.Kind.Name(model.kind).removeprefix("KIND_"),
            "base_model": lambda model, _: model.base_model,
            "fine_tuning_job": lambda model, _: model.fine_tuning_job,
        },
    )
