"""Aliases of models: names for roles, such as `production`, which move from model to model through gates."""

from __future__ import annotations

from luthier.client import names
from luthier.client.async_driver import AsyncResource, async_method, async_stream_method
from luthier.client.flows import Flow, Scope, StreamFlow, call, pages
from luthier.client.sync_driver import SyncResource, list_method, method
from luthier.v1 import evaluation_service_pb2 as api
from luthier.v1.model_alias_pb2 import AliasMove, ModelAlias


def create(scope: Scope, model_alias: ModelAlias, *, model_alias_id: str = "") -> Flow[ModelAlias]:
    """Create an alias that stands for no model yet; its `gates` say what an evaluation must show before it moves."""
    request = api.CreateModelAliasRequest(
        parent=names.project(scope.project), model_alias=model_alias, model_alias_id=model_alias_id
    )
    return call(scope, lambda stubs: stubs.evaluation.CreateModelAlias, request)


def get(scope: Scope, name: str) -> Flow[ModelAlias]:
    """Read one alias; `current.model` is the model that it stands for now."""
    request = api.GetModelAliasRequest(name=names.alias(scope.project, name))
    return call(scope, lambda stubs: stubs.evaluation.GetModelAlias, request)


def list_all(
    scope: Scope,
    *,
    filter: str = "",  # noqa: A002 - the name on the wire
    order_by: str = "",
    page_size: int = 0,
) -> StreamFlow[ModelAlias]:
    """Go through the aliases of the project, newest first."""
    request = api.ListModelAliasesRequest(
        parent=names.project(scope.project), filter=filter, order_by=order_by, page_size=page_size
    )
    return pages(
        scope, lambda stubs: stubs.evaluation.ListModelAliases, request, lambda page: page.model_aliases
    )


def move(scope: Scope, name: str, model: str, *, evaluation: str = "", etag: str = "") -> Flow[ModelAlias]:
    """Let an alias stand for a model, if an evaluation of it opens all gates.

    Raise FailedPrecondition ALIAS_BLOCKED, with the numbers of each gate that is shut, otherwise.
    """
    request = api.MoveModelAliasRequest(
        name=names.alias(scope.project, name),
        model=names.child(scope.project, "models", model),
        evaluation=names.child(scope.project, "evaluations", evaluation) if evaluation else "",
        etag=etag,
    )
    return call(scope, lambda stubs: stubs.evaluation.MoveModelAlias, request)


def list_moves(scope: Scope, name: str, *, page_size: int = 0) -> StreamFlow[AliasMove]:
    """Go through the moves of an alias, from the first."""
    request = api.ListModelAliasMovesRequest(parent=names.alias(scope.project, name), page_size=page_size)
    return pages(scope, lambda stubs: stubs.evaluation.ListModelAliasMoves, request, lambda page: page.moves)


def delete(scope: Scope, name: str, *, etag: str = "") -> Flow[ModelAlias]:
    """Delete an alias, with its history. The model that it stands for stays."""
    request = api.DeleteModelAliasRequest(name=names.alias(scope.project, name), etag=etag)
    return call(scope, lambda stubs: stubs.evaluation.DeleteModelAlias, request)


class Aliases(SyncResource):
    """Aliases of models."""

    create = method(create)
    get = method(get)
    list = list_method(list_all)
    move = method(move)
    moves = list_method(list_moves)
    delete = method(delete)


class AsyncAliases(AsyncResource):
    """Aliases of models."""

    create = async_method(create)
    get = async_method(get)
    list = async_stream_method(list_all)
    move = async_method(move)
    moves = async_stream_method(list_moves)
    delete = async_method(delete)
