"""Text from a base model or an adapter, streamed as it comes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from luthier.errors import FailedPrecondition, Reason
from luthier.evaluation.asking import as_taught
from luthier.evaluation.evaluations.service import MODEL, ModelFacts, Peers
from luthier.evaluation.generation.domain import ModelAt, Order, Piece, Wish, check_wish
from luthier.evaluation.generation.exchange import Exchange
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of, require_project

_TOKEN_SECONDS = 900.0


class GenerationService:
    """Looks the models up and places the order."""

    def __init__(
        self, exchange: Exchange, peers: Peers, task_tokens: TaskTokens, projects: Sequence[str]
    ) -> None:
        self._exchange = exchange
        self._peers = peers
        self._task_tokens = task_tokens
        self._projects = projects

    async def generate(self, wish: Wish) -> AsyncIterator[Piece]:
        """Yield the answer piece by piece.

        Raises:
            InvalidArgument: a field is not valid.
            NotFound: the model does not exist.
            FailedPrecondition: the model is not READY, or has no chat template.
            Unavailable: no worker is there.
            ResourceExhausted: too many orders wait.
        """
        MODEL.parse(wish.model, field="model")
        project = require_project(f"projects/{project_of(wish.model)}", self._projects, field="model")
        check_wish(wish)
        model = await self._ready(wish.model)
        base = await self._ready(model.base_model) if model.base_model else model
        asking = as_taught(model.taught, base.as_base(datetime.now(UTC).date()))
        if wish.turns and not (asking.chat_template or base.has_chat_template):
            raise FailedPrecondition(
                f"{base.name} has no chat template and {model.name} was not taught with one; send prompt instead of "
                "conversation",
                reason=Reason.CHAT_TEMPLATE_MISSING,
                metadata={"model": base.name},
            )
        generation_id = uuid.uuid4().hex
        resources = tuple({base.name, model.name})
        order = Order(
            generation_id=generation_id,
            base_model=ModelAt(name=base.name, digest=base.digest),
            adapter=ModelAt(name=model.name, digest=model.digest) if model.base_model else None,
            turns=wish.turns,
            tools_json=wish.tools_json,
            prompt=wish.prompt,
            max_new_tokens=wish.max_new_tokens,
            temperature=wish.temperature,
            top_p=wish.top_p,
            seed=wish.seed,
            token=self._task_tokens.mint(project, resources, 0, generation_id, _TOKEN_SECONDS),
            asking=asking,
        )
        async for piece in self._exchange.generate(order):
            yield replace(piece, template_source=asking.source) if piece.is_last and wish.turns else piece

    async def _ready(self, name: str) -> ModelFacts:
        model = await self._peers.model(name)
        if not model.ready:
            raise FailedPrecondition(
                f"{name} must be READY, it is {model.state}",
                reason=Reason.WRONG_STATE,
                metadata={"name": name, "state": model.state},
            )
        return model
