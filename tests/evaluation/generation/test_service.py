"""What becomes of a wish: models looked up, an order placed that names them, a token that opens only them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from luthier.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, Reason
from luthier.evaluation.asking import Taught, TemplateSource
from luthier.evaluation.evaluations.service import ModelFacts, VersionFacts
from luthier.evaluation.generation.convert import order_to_proto
from luthier.evaluation.generation.domain import FinishReason, ModelAt, Order, Piece, Turn, Wish
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.generation.service import GenerationService
from luthier.runtime.auth import TaskTokens
from luthier.v1 import evaluation_pb2

BASE, TUNED = "projects/default/models/base", "projects/default/models/tuned"
WISH = Wish(
    model=TUNED,
    turns=(Turn(role="user", content="hi"),),
    tools_json="",
    prompt="",
    max_new_tokens=16,
    temperature=0.5,
    top_p=0.9,
    seed=3,
)


@dataclass
class MemoryPeers:
    """Two models, which a test may change."""

    models: dict[str, ModelFacts] = field(
        default_factory=lambda: {
            name: ModelFacts(
                name=name,
                ready=True,
                state="READY",
                digest=f"digest of {name}",
                base_model=BASE if name == TUNED else "",
                has_chat_template=name == BASE,
            )
            for name in (BASE, TUNED)
        }
    )

    async def version(self, name: str) -> VersionFacts:
        raise NotFound(f"{name} does not exist")

    async def model(self, name: str) -> ModelFacts:
        if name not in self.models:
            raise NotFound(f"{name} does not exist")
        return self.models[name]


@dataclass
class Bench:
    """A service with a worker that says `yes`."""

    peers: MemoryPeers = field(default_factory=MemoryPeers)
    exchange: Exchange = field(default_factory=Exchange)
    tokens: TaskTokens = field(default_factory=lambda: TaskTokens("s" * 32))
    orders: list[Order] = field(default_factory=list)

    async def say_yes(self) -> None:
        async for order in self.exchange.take(1):
            assert isinstance(order, Order)
            self.orders.append(order)
            yes = Piece(generation_id=order.generation_id, text="yes", finish_reason=FinishReason.STOP)
            self.exchange.push(yes)

    async def ask(self, wish: Wish) -> list[str]:
        return [piece.text for piece in await self.pieces(wish)]

    async def pieces(self, wish: Wish) -> list[Piece]:
        service = GenerationService(self.exchange, self.peers, self.tokens, ("default",))
        worker = asyncio.create_task(self.say_yes())
        await asyncio.sleep(0)
        try:
            return [piece async for piece in service.generate(wish)]
        finally:
            worker.cancel()


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_an_order_names_both_models_and_its_token_opens_only_them(bench: Bench) -> None:
    assert await bench.ask(WISH) == ["yes"]
    (order,) = bench.orders
    assert order.base_model == ModelAt(name=BASE, digest=f"digest of {BASE}")
    assert order.adapter == ModelAt(name=TUNED, digest=f"digest of {TUNED}")
    assert (order.turns, order.temperature, order.top_p, order.seed) == (WISH.turns, 0.5, 0.9, 3)
    principal = bench.tokens.verify(order.token)
    assert (principal.kind, principal.project) == ("task", "default")
    assert set(principal.resources) == {BASE, TUNED}


async def test_a_base_model_is_its_own_base(bench: Bench) -> None:
    await bench.ask(replace(WISH, model=BASE))
    assert bench.orders[0].adapter is None
    assert bench.tokens.verify(bench.orders[0].token).resources == (BASE,)


async def test_each_order_has_an_id_of_its_own(bench: Bench) -> None:
    await bench.ask(WISH)
    await bench.ask(WISH)
    assert len({order.generation_id for order in bench.orders}) == 2


TAUGHT = Taught(
    chat_template="{{ messages }}",
    template_date="2026-01-02",
    prefix_token_ids=(1,),
    stop_token_ids=(2, 3),
)


async def test_a_tuned_model_is_asked_as_it_was_taught_though_its_base_has_no_template(bench: Bench) -> None:
    bench.peers.models[BASE] = replace(bench.peers.models[BASE], has_chat_template=False)
    bench.peers.models[TUNED] = replace(bench.peers.models[TUNED], taught=TAUGHT)
    pieces = await bench.pieces(WISH)
    assert [piece.template_source for piece in pieces] == [TemplateSource.TAUGHT]
    (order,) = bench.orders
    asking = order_to_proto(order).asking
    assert asking.template_source == evaluation_pb2.TEMPLATE_SOURCE_TAUGHT
    assert (asking.chat_template, asking.template_date) == ("{{ messages }}", "2026-01-02")
    assert (list(asking.prefix.token_ids), list(asking.stop_token_ids)) == ([1], [2, 3])
    with pytest.raises(FailedPrecondition, match=f"{BASE} has no chat template and {BASE} was not taught"):
        await bench.ask(replace(WISH, model=BASE))


async def test_a_tuned_model_that_nothing_is_known_of_is_asked_as_its_base_and_says_so(bench: Bench) -> None:
    pieces = await bench.pieces(WISH)
    assert [piece.template_source for piece in pieces] == [TemplateSource.BASE]
    asking = order_to_proto(bench.orders[0]).asking
    assert asking.template_date == datetime.now(UTC).date().isoformat()
    assert (asking.chat_template, asking.HasField("prefix")) == ("", False)


async def test_turns_need_the_bases_chat_template_and_a_prompt_does_not(bench: Bench) -> None:
    bench.peers.models[BASE] = replace(bench.peers.models[BASE], has_chat_template=False)
    with pytest.raises(FailedPrecondition, match="send prompt instead of conversation") as caught:
        await bench.ask(WISH)
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING
    assert await bench.ask(replace(WISH, turns=(), prompt="hi")) == ["yes"]


@pytest.mark.parametrize("name", [BASE, TUNED])
async def test_neither_model_may_be_less_than_ready(bench: Bench, name: str) -> None:
    bench.peers.models[name] = replace(bench.peers.models[name], ready=False, state="FAILED")
    with pytest.raises(FailedPrecondition, match=f"{name} must be READY, it is FAILED"):
        await bench.ask(WISH)
    assert bench.orders == []


@pytest.mark.parametrize(
    ("model", "kind", "said"),
    [
        ("m", InvalidArgument, "got 'm'"),
        ("projects/other/models/base", LuthierError, "projects/other"),
        ("projects/default/models/none", NotFound, "does not exist"),
    ],
)
async def test_a_model_that_is_not_there_is_refused(
    bench: Bench, model: str, kind: type[LuthierError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        await bench.ask(replace(WISH, model=model))
