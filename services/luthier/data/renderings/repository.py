"""Renderings in SQL."""

from __future__ import annotations

from luthier.data import schema
from luthier.storage.stored import Rows
from luthier.stored.v1.data_pb2 import RenderingPrivate
from luthier.v1.rendering_pb2 import Rendering
from luthier.work.families import WAITING


def renderings() -> Rows[Rendering, RenderingPrivate]:
    """Return the stored renderings."""
    return Rows(schema.renderings, Rendering, RenderingPrivate, progress_fields=(WAITING,))
