"""What jobs need of models: the two families meet where the service is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.training.weights import Origin, SeenModel, StoredModel
from luthier.v1.model_pb2 import Model, ModelFile, Taught
from luthier.worker.v1.task_pb2 import BlobFile


class Models(Protocol):
    """Where base models come from and tuned ones go."""

    async def find_base(self, connection: AsyncConnection, name: str) -> StoredModel:
        """Return a READY base model. Raises NotFound, InvalidArgument, FailedPrecondition WRONG_STATE."""
        ...

    async def find_ready(self, connection: AsyncConnection, name: str) -> StoredModel:
        """Return a READY model of any kind. Raises NotFound, FailedPrecondition WRONG_STATE."""
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

    async def keep_generation_config(self, base: StoredModel, taught: Taught) -> ModelFile | None:
        """Store and return the generation config of a model that will be taught so on a base.

        None: nobody names a token that ends answers. Raises InvalidArgument MODEL_INVALID where the base's own cannot
        be read.
        """
        ...

    async def tuned(
        self, connection: AsyncConnection, wanted: Model, origin: Origin, brought: Sequence[BlobFile]
    ) -> SeenModel:
        """Return what a tuned model of these files is, without storing it; files that are no result are left out.

        Raises as `add_tuned`, NotFound when its base model is gone.
        """
        ...

    async def add_tuned(
        self, connection: AsyncConnection, wanted: Model, origin: Origin, tuned: Sequence[BlobFile]
    ) -> StoredModel:
        """Store a tuned model as READY, and return it; its name is another one when the wanted one is taken.

        `wanted` says its name, kind, job, step, how it was taught and what it was made from; an adapter its base.
        Raises InvalidArgument MODEL_INVALID for files that are not those of its kind.
        """
        ...
