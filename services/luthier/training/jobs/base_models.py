"""What jobs need of models, as Protocols: the two families meet where the service is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.training.teaching import Taught


class BaseModelFile(Protocol):
    """One file of a base model."""

    @property
    def path(self) -> str:
        """Path relative to the model's folder."""

    @property
    def sha256(self) -> str:
        """Digest in hex."""

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""

    @property
    def tokenizer(self) -> bool:
        """Whether the file belongs to the tokenizer bundle."""


class BaseModel(Protocol):
    """A READY base model."""

    @property
    def digest(self) -> str:
        """Digest of all its files."""

    @property
    def tokenizer_digest(self) -> str:
        """Digest of its tokenizer bundle."""

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens, 0 when the model does not say."""

    @property
    def files(self) -> Sequence[BaseModelFile]:
        """Its files."""


class Models(Protocol):
    """Where base models come from and tuned ones go."""

    async def find_base(self, connection: AsyncConnection, name: str) -> BaseModel:
        """Return a READY base model. Raises NotFound, InvalidArgument, FailedPrecondition WRONG_STATE."""
        ...

    async def exists(self, connection: AsyncConnection, name: str) -> bool:
        """Tell whether a name is taken."""
        ...

    async def keep_template(self, taught: Taught) -> None:
        """Store the template file of a model that will be taught so."""
        ...

    async def add_adapter(
        self,
        connection: AsyncConnection,
        name: str,
        base_model: str,
        fine_tuning_job: str,
        step: int,
        files: Mapping[str, tuple[str, int]],
        taught: Taught | None,
    ) -> str:
        """Store a tuned adapter as READY; `files` maps a path to digest and size. Returns its name."""
        ...
