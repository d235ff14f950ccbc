"""What can be done with aliases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.aliases import repository, rules
from luthier.evaluation.names import ALIAS, EVALUATION, MODEL
from luthier.evaluation.ready import require_ready
from luthier.runtime.names import child_name
from luthier.runtime.paging import PageTokens
from luthier.storage.database import Database
from luthier.storage.stored import Stored, require_etag
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, ModelAliasPrivate
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.evaluation_service_pb2 import CreateModelAliasRequest, MoveModelAliasRequest
from luthier.v1.model_alias_pb2 import AliasMove, ModelAlias
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.work import elsewhere
from luthier.work.elsewhere import Elsewhere
from luthier.work.listing import ListRequest, list_page
from luthier.work.undeleting import delete_free


class Models(Protocol):
    """Where aliases find their models."""

    async def model(self, name: str) -> Model:
        """Return a model. Raises NotFound."""
        ...


class Evaluations(Protocol):
    """Where aliases find what opens their gates."""

    async def read(self, name: str, uid: str = "") -> Stored[Evaluation, EvaluationPrivate]:
        """Return an evaluation. Raises NotFound."""
        ...


class AliasService:
    """Use cases of aliases. A parent's project is checked by the caller."""

    def __init__(
        self, database: Database, models: Models, evaluations: Evaluations, holds: Elsewhere
    ) -> None:
        self._database = database
        self._models = models
        self._evaluations = evaluations
        self._holds = holds
        self._rows = repository.aliases()
        self._moves = repository.Moves()

    async def create(self, request: CreateModelAliasRequest) -> ModelAlias:
        """Create an alias that stands for no model yet. Raises InvalidArgument, AlreadyExists."""
        rules.check(request.model_alias)
        alias = ModelAlias()
        alias.CopyFrom(request.model_alias)
        alias.name = child_name(
            request.parent, "modelAliases", request.model_alias_id, field="model_alias_id", prefix="alias"
        )
        async with self._database.transaction() as connection:
            return (await self._rows.insert(connection, alias, ModelAliasPrivate())).message

    async def get(self, name: str) -> ModelAlias:
        """Return an alias. Raises NotFound."""
        return (await self._rows.read(self._database, name)).message

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[ModelAlias, ...], str]:
        """Return a page of a project's aliases and the next page's token. Raises InvalidArgument."""
        return await list_page(self._database, self._rows, tokens, request, filters=("labels",))

    async def move(self, request: MoveModelAliasRequest) -> ModelAlias:
        """Let an alias stand for another model, all at once, with the reasons in its history.

        Raises InvalidArgument, NotFound, Aborted, FailedPrecondition as `rules.moved`, and Unavailable.
        """
        MODEL.parse(request.model, field="model")
        alias = await self._rows.read(self._database, request.name)
        require_etag(alias, request.etag)
        rules.require_evaluation(alias.message, request.evaluation)
        evaluation = None
        if request.evaluation:
            EVALUATION.parse(request.evaluation, field="evaluation")
            evaluation = (await self._evaluations.read(request.evaluation)).message
        model = await self._models.model(request.model)
        require_ready(model)
        changed = rules.moved(alias.message, model, evaluation)
        needed = [Reference(name=model.name, uid=model.uid, digest=model.digest)]
        async with (
            self._holds.holding(request.name, needed) as holds,
            self._database.transaction() as connection,
        ):
            # Whoever moved it in between wins: this move was decided on what was before.
            stored = await self._rows.update(connection, alias, changed)
            await elsewhere.release_all(connection, stored.uid)
            await elsewhere.record(connection, holds, stored)
            await self._moves.add(connection, stored.uid, changed.current)
            return stored.message

    async def uid_of(self, name: str) -> str:
        """Return the uid of the alias of a name. Raises NotFound."""
        return (await self._rows.read(self._database, name)).uid

    async def moves(self, uid: str, after: int, limit: int) -> Sequence[AliasMove]:
        """Return at most `limit` moves of the alias of a uid after a number."""
        async with self._database.reading() as connection:
            return await self._moves.read(connection, uid, after, limit)

    async def delete(self, name: str, etag: str) -> ModelAlias:
        """Delete an alias and its history. Raises NotFound, Aborted."""
        async with self._database.transaction(makes_room=True) as connection:
            alias = await self._rows.get(connection, name)
            require_etag(alias, etag)
            await self._moves.forget(connection, alias.uid)
            return (await delete_free(connection, self._rows, alias, None)).message

    async def model_of(self, name: str) -> str:
        """Return the name of the model that an alias stands for now.

        Raises InvalidArgument, NotFound, FailedPrecondition WRONG_STATE before its first move.
        """
        ALIAS.parse(name, field="model")
        alias = await self.get(name)
        if not alias.HasField("current"):
            raise FailedPrecondition(
                f"{name} stands for no model yet; move it to one",
                reason=Reason.WRONG_STATE,
                metadata={"name": name},
            )
        return alias.current.model
