"""Renderings in SQL."""

from __future__ import annotations

from luthier.data import schema
from luthier.data.renderings.domain import Rendering
from luthier.storage.resources import Resources


def renderings() -> Resources[Rendering]:
    """Return the stored renderings."""
    return Resources(schema.renderings, Rendering)
