"""Text from a base model or an adapter, streamed as it comes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Protocol

from luthier.errors import FailedPrecondition, Internal, Reason
from luthier.evaluation.asking import as_taught
from luthier.evaluation.generation import rules
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.names import ALIAS, WEIGHTS
from luthier.evaluation.precision import asked_in
from luthier.evaluation.ready import require_askable, require_ready
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.v1.base_precision_pb2 import BasePrecision
from luthier.v1.evaluation_service_pb2 import (
    GenerateTextRequest,
    GenerateTextResponse,
    ScoreTextsRequest,
    ScoreTextsResponse,
)
from luthier.v1.model_pb2 import Model
from luthier.worker.v1.task_pb2 import ModelReference
from luthier.worker.v1.worker_service_pb2 import GenerationOrder

_TOKEN_SECONDS = 900.0


class Models(Protocol):
    """Where generation finds its models."""

    async def model(self, name: str) -> Model:
        """Return a model; one that was tuned says how it was taught where anybody knows. Raises NotFound."""
        ...


class Aliases(Protocol):
    """Where generation finds what aliases stand for."""

    async def model_of(self, name: str) -> str:
        """Return the name of the model that an alias stands for now. Raises NotFound, FailedPrecondition."""
        ...


class GenerationService:
    """Looks the models up and places the order."""

    def __init__(
        self,
        exchange: Exchange,
        models: Models,
        aliases: Aliases,
        task_tokens: TaskTokens,
    ) -> None:
        self._exchange = exchange
        self._models = models
        self._aliases = aliases
        self._task_tokens = task_tokens

    async def generate(self, request: GenerateTextRequest) -> AsyncIterator[GenerateTextResponse]:
        """Yield the answer piece by piece.

        Raises:
            InvalidArgument: a field is not valid.
            NotFound: the model does not exist.
            FailedPrecondition: the model is not READY, or has no chat template.
            Unavailable: no worker is there.
            ResourceExhausted: too many orders wait.
        """
        _require_name(request.model)
        wanted = rules.resolved(request)
        rules.check(wanted)
        model, base = await self._found(wanted.model)
        order = self._order(model, base, wanted.base_precision)
        order.max_new_tokens = wanted.max_new_tokens
        order.temperature, order.top_p, order.seed = wanted.temperature, wanted.top_p, wanted.seed
        if wanted.WhichOneof("input") == "conversation":
            order.conversation.CopyFrom(wanted.conversation)
        else:
            order.prompt = wanted.prompt
        has_turns = wanted.WhichOneof("input") == "conversation"
        if has_turns and not (order.asking.chat_template or base.has_chat_template):
            raise FailedPrecondition(
                f"{base.name} has no chat template and {model.name} was not taught with one; send prompt instead of "
                "conversation",
                reason=Reason.CHAT_TEMPLATE_MISSING,
                metadata={"model": base.name},
            )
        async for piece in self._exchange.generate(order):
            response = GenerateTextResponse(
                text=piece.text,
                finish_reason=piece.finish_reason,
                num_generated_tokens=piece.num_generated_tokens,
            )
            if rules.is_last(piece):
                response.num_prompt_tokens = piece.num_prompt_tokens
                if has_turns:
                    response.template_source = order.asking.template_source
            yield response

    async def score(self, request: ScoreTextsRequest) -> ScoreTextsResponse:
        """Return how likely a model finds texts. Raises as `generate`."""
        _require_name(request.model)
        rules.check_texts(request)
        model, base = await self._found(request.model)
        order = self._order(model, base, request.base_precision)
        order.texts.texts.extend(request.texts)
        order.context_length = base.context_length
        async for piece in self._exchange.generate(order):
            if len(piece.scores) == len(request.texts):
                return ScoreTextsResponse(scores=piece.scores)
        raise Internal(f"the worker must give {len(request.texts)} scores, it gave none; is it an older one?")

    async def _found(self, name: str) -> tuple[Model, Model]:
        """Return a model that gives words, by its own name or an alias's, and the one below it, both READY."""
        if _is_alias(name):
            name = await self._aliases.model_of(name)
        model = await self._ready(name)
        require_askable(model, "model")
        return model, await self._ready(model.base_model) if model.base_model else model

    def _order(self, model: Model, base: Model, said: BasePrecision.ValueType) -> GenerationOrder:
        generation_id = uuid.uuid4().hex
        resources = tuple({base.name, model.name})
        project = project_of(model.name)
        return GenerationOrder(
            generation=generation_id,
            base_model=_reference(base),
            adapter=_reference(model) if model.base_model else None,
            token=self._task_tokens.mint(project, resources, 0, generation_id, _TOKEN_SECONDS),
            asking=as_taught(model, base, datetime.now(UTC).date()),
            base_precision=asked_in(said, model),
        )

    async def _ready(self, name: str) -> Model:
        model = await self._models.model(name)
        require_ready(model)
        return model


def _require_name(name: str) -> None:
    """Raise InvalidArgument for what cannot be the name of what is asked."""
    (ALIAS if _is_alias(name) else WEIGHTS).parse(name, field="model")


def _is_alias(name: str) -> bool:
    return "/modelAliases/" in name


def _reference(model: Model) -> ModelReference:
    return ModelReference(name=model.name, digest=model.digest)
