"""What jobs need of models: the two families meet where the service is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.storage.stored import Stored
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.v1.model_pb2 import Model, Taught
from luthier.worker.v1.task_pb2 import BlobFile

StoredModel = Stored[Model, ModelPrivate]


class Models(Protocol):
    """Where base models come from and tuned ones go."""

    async def find_base(self, connection: AsyncConnection, name: str) -> StoredModel:
        """Return a READY base model. Raises NotFound, InvalidArgument, FailedPrecondition WRONG_STATE."""
        ...

    async def base(self, connection: AsyncConnection, uid: str) -> StoredModel:
        """Return the model of a uid. Raises NotFound."""
        ...

    async def live(self, name: str) -> Sequence[str]:
        """Return the uid of the model that has a name now, as filters take it; empty when none has."""
        ...

    async def exists(self, connection: AsyncConnection, name: str) -> bool:
        """Tell whether a name is taken."""
        ...

    async def keep_template(self, taught: Taught) -> None:
        """Store the template file of a model that will be taught so."""
        ...

    async def add_adapter(
        self, connection: AsyncConnection, wanted: Model, tuned: Sequence[BlobFile]
    ) -> StoredModel:
        """Store a tuned adapter as READY, and return it; its name is another one when the wanted one is taken.

        `wanted` says its name, base model, job, step, how it was taught and what it was made from.
        """
        ...
