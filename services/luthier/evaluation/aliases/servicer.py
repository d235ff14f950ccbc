"""Aliases on the wire."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import grpc.aio

from luthier.evaluation.aliases.service import AliasService
from luthier.evaluation.names import ALIAS
from luthier.runtime.names import check_name, require_project
from luthier.runtime.paging import PageTokens
from luthier.v1 import evaluation_service_pb2
from luthier.v1.model_alias_pb2 import ModelAlias
from luthier.work.listing import entries_page
from luthier.work.standard_methods import StandardMethods

Context = grpc.aio.ServicerContext[Any, Any]


class AliasesServicer:
    """The aliases' part of EvaluationService."""

    def __init__(self, aliases: AliasService, page_tokens: PageTokens, projects: Container[str]) -> None:
        self._aliases = aliases
        self._page_tokens = page_tokens
        self._projects = projects
        standard = StandardMethods(pattern=ALIAS, tokens=page_tokens, projects=projects)
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
        require_project(request.parent, self._projects)
        return await self._aliases.create(request)

    async def MoveModelAlias(
        self, request: evaluation_service_pb2.MoveModelAliasRequest, context: Context
    ) -> ModelAlias:
        """Move an alias to a model."""
        check_name(ALIAS, request.name, self._projects)
        return await self._aliases.move(request)

    async def ListModelAliasMoves(
        self, request: evaluation_service_pb2.ListModelAliasMovesRequest, context: Context
    ) -> evaluation_service_pb2.ListModelAliasMovesResponse:
        """Page through an alias's moves."""
        check_name(ALIAS, request.parent, self._projects, field="parent")
        uid = await self._aliases.uid_of(request.parent)
        moves, token = await entries_page(
            self._page_tokens, request, uid, self._aliases.moves, lambda move: move.number
        )
        return evaluation_service_pb2.ListModelAliasMovesResponse(moves=moves, next_page_token=token)
