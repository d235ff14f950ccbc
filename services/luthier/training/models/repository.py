"""Models in SQL."""

from __future__ import annotations

from luthier.storage.resources import Resources
from luthier.training import schema
from luthier.training.models.domain import Model


def models() -> Resources[Model]:
    """Return the models as stored resources."""
    return Resources(schema.models, Model)
