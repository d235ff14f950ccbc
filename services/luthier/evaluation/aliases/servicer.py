"""Aliases on the wire."""

from __future__ import annotations

from typing import Any

import grpc.aio

from luthier.evaluation.aliases.service import AliasService
from luthier.evaluation.names import ALIAS
from luthier.runtime.names import PROJECT
from luthier.runtime.paging import PageTokens
from luthier.v1 import evaluation_service_pb2
from luthier.v1.model_alias_pb2 import ModelAlias
from luthier.work.listing import entries_page
from luthier.work.standard_methods import StandardMethods

Context = grpc.aio.ServicerContext[Any, Any]


class AliasesServicer:
    """The aliases' part of EvaluationService."""

    def __init__(self, aliases: AliasService, page_tokens: PageTokens) -> None:
        self._aliases = aliases
        self._page_tokens = page_tokens
        standard = StandardMethods(pattern=ALIAS, tokens=page_tokens)
        self.GetModelAlias = standard.get(aliases.get)
        self.ListModelAliases = standard.list(
            aliases.list_page,
            lambda found, token: evaluation_service_pb2.ListModelAliasesResponse(
                model_aliases=found, next_page_token=token
            ),
        )
        self.DeleteModelAlias = standard.delete(aliases.delete)

    async def CreateModelAlias(
        self, request: evaluation_service_pb2.CreateModelAliasRequest, context: Context
    ) -> ModelAlias:
        """Create an alias."""
        PROJECT.parse(request.parent, field="parent")
        return await self._aliases.create(request)

    async def MoveModelAlias(
        self, request: evaluation_service_pb2.MoveModelAliasRequest, context: Context
    ) -> ModelAlias:
        """Move an alias to a model."""
        ALIAS.parse(request.name)
        return await self._aliases.move(request)

    async def ListModelAliasMoves(
        self, request: evaluation_service_pb2.ListModelAliasMovesRequest, context: Context
    ) -> evaluation_service_pb2.ListModelAliasMovesResponse:
        """Page through an alias's moves."""
        ALIAS.parse(request.parent, field="parent")
        uid = await self._aliases.uid_of(request.parent)
        moves, token = await entries_page(
            self._page_tokens, request, uid, self._aliases.moves, lambda move: move.number
        )
        return evaluation_service_pb2.ListModelAliasMovesResponse(moves=moves, next_page_token=token)
