"""What becomes of a wish: models looked up, an order placed that names them, a token that opens only them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from luthier.errors import FailedPrecondition, Internal, InvalidArgument, LuthierError, NotFound, Reason
from luthier.evaluation.generation.exchange import Exchange, Piece
from luthier.evaluation.generation.service import GenerationService
from luthier.runtime.auth import TaskTokens
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_INT8,
    BASE_PRECISION_NF4,
)
from luthier.v1.chat_pb2 import ChatMessage, Conversation
from luthier.v1.evaluation_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    TEMPLATE_SOURCE_BASE,
    TEMPLATE_SOURCE_TAUGHT,
)
from luthier.v1.evaluation_service_pb2 import (
    GenerateTextRequest,
    GenerateTextResponse,
    ScoreTextsRequest,
    ScoreTextsResponse,
)
from luthier.v1.model_pb2 import Model, Taught
from luthier.v1.text_score_pb2 import TextScore, TextToScore
from luthier.worker.v1.task_pb2 import ModelReference
from luthier.worker.v1.worker_service_pb2 import GenerationOrder

BASE, TUNED = "projects/default/models/base", "projects/default/models/tuned"
ALIAS = "projects/default/modelAliases/production"
HI = Conversation(messages=[ChatMessage(role="user", content="hi")])


def wish(model: str = TUNED, prompt: str = "") -> GenerateTextRequest:
    """A wish for an answer to `HI`, or with a prompt for what follows it."""
    request = GenerateTextRequest(
        model=model, conversation=HI, max_new_tokens=16, temperature=0.5, top_p=0.9, seed=3
    )
    if prompt:
        request.prompt = prompt
    return request


@dataclass
class MemoryModels:
    """Two models, which a test may change."""

    models: dict[str, Model] = field(
        default_factory=lambda: {
            name: Model(
                name=name,
                state=Model.STATE_READY,
                digest=f"digest of {name}",
                base_model=BASE if name == TUNED else "",
                has_chat_template=name == BASE,
            )
            for name in (BASE, TUNED)
        }
    )

    async def model(self, name: str) -> Model:
        if name not in self.models:
            raise NotFound(f"{name} does not exist")
        return self.models[name]

    async def model_of(self, name: str) -> str:
        if name != ALIAS:
            raise NotFound(f"{name} does not exist")
        return TUNED


@dataclass
class Bench:
    """A service with a worker that says `yes`."""

    peers: MemoryModels = field(default_factory=MemoryModels)
    exchange: Exchange = field(default_factory=Exchange)
    tokens: TaskTokens = field(default_factory=lambda: TaskTokens("s" * 32))
    orders: list[GenerationOrder] = field(default_factory=list)

    async def say_yes(self) -> None:
        async for message in self.exchange.take("w", 1):
            assert message.WhichOneof("message") == "order"
            self.orders.append(message.order)
            for text, reason in (("ye", FINISH_REASON_UNSPECIFIED), ("s", FINISH_REASON_STOP)):
                piece = Piece(
                    generation=message.order.generation,
                    text=text,
                    finish_reason=reason,
                    num_prompt_tokens=7,
                    num_generated_tokens=len(text),
                )
                await self.exchange.push(piece)

    async def ask(self, request: GenerateTextRequest) -> str:
        return "".join(piece.text for piece in await self.pieces(request))

    async def pieces(self, request: GenerateTextRequest) -> list[GenerateTextResponse]:
        service = GenerationService(self.exchange, self.peers, self.peers, self.tokens)
        worker = asyncio.create_task(self.say_yes())
        await asyncio.sleep(0)
        try:
            return [piece async for piece in service.generate(request)]
        finally:
            worker.cancel()


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_an_alias_is_asked_as_the_model_that_it_stands_for(bench: Bench) -> None:
    wanted = wish()
    wanted.model = ALIAS
    assert await bench.ask(wanted) == "yes"
    assert bench.orders[0].adapter.name == TUNED
    wanted.model = f"{ALIAS}-2"
    with pytest.raises(NotFound, match="production-2 does not exist"):
        await bench.ask(wanted)


async def test_an_order_names_both_models_and_its_token_opens_only_them(bench: Bench) -> None:
    assert await bench.ask(wish()) == "yes"
    (order,) = bench.orders
    assert order.base_model == ModelReference(name=BASE, digest=f"digest of {BASE}")
    assert order.adapter == ModelReference(name=TUNED, digest=f"digest of {TUNED}")
    assert (order.conversation, order.temperature, order.top_p, order.seed) == (HI, 0.5, 0.9, 3)
    principal = bench.tokens.verify(order.token)
    assert (principal.kind, principal.projects) == ("task", frozenset({"default"}))
    assert set(principal.resources) == {BASE, TUNED}


async def test_a_base_model_is_its_own_base(bench: Bench) -> None:
    await bench.ask(wish(BASE))
    assert not bench.orders[0].HasField("adapter")
    assert bench.tokens.verify(bench.orders[0].token).resources == (BASE,)


async def test_an_adapter_is_asked_beside_what_it_was_trained_beside_unless_else_is_said(
    bench: Bench,
) -> None:
    bench.peers.models[TUNED].base_precision = BASE_PRECISION_NF4
    await bench.ask(wish())
    said = wish()
    said.base_precision = BASE_PRECISION_INT8
    await bench.ask(said)
    await bench.ask(wish(BASE))
    assert [order.base_precision for order in bench.orders] == [
        BASE_PRECISION_NF4,
        BASE_PRECISION_INT8,
        BASE_PRECISION_BFLOAT16,
    ]


async def test_each_order_has_an_id_of_its_own(bench: Bench) -> None:
    await bench.ask(wish())
    await bench.ask(wish())
    assert len({order.generation for order in bench.orders}) == 2


TAUGHT = Taught(
    chat_template="{{ messages }}",
    template_date="2026-01-02",
    prefix_token_ids=[1],
    stop_token_ids=[2, 3],
)


async def test_a_tuned_model_is_asked_as_it_was_taught_though_its_base_has_no_template(bench: Bench) -> None:
    bench.peers.models[BASE].has_chat_template = False
    bench.peers.models[BASE].eos_token_ids.extend([9])
    bench.peers.models[TUNED].taught.CopyFrom(TAUGHT)
    pieces = await bench.pieces(wish())
    assert [piece.template_source for piece in pieces] == [0, TEMPLATE_SOURCE_TAUGHT]
    (order,) = bench.orders
    asking = order.asking
    assert asking.template_source == TEMPLATE_SOURCE_TAUGHT
    assert (asking.chat_template, asking.template_date) == ("{{ messages }}", "2026-01-02")
    assert (list(asking.prefix.token_ids), list(asking.stop_token_ids)) == ([1], [2, 3])
    assert (list(asking.eos_token_ids), asking.old_prefix) == ([9], False)
    with pytest.raises(FailedPrecondition, match=f"{BASE} has no chat template and {BASE} was not taught"):
        await bench.ask(wish(BASE))


async def test_a_tuned_model_that_nothing_is_known_of_is_asked_as_its_base_and_says_so(bench: Bench) -> None:
    pieces = await bench.pieces(wish())
    assert [piece.template_source for piece in pieces] == [0, TEMPLATE_SOURCE_BASE]
    assert [piece.num_prompt_tokens for piece in pieces] == [0, 7]
    assert [piece.num_generated_tokens for piece in pieces] == [2, 1]
    asking = bench.orders[0].asking
    assert asking.template_date == datetime.now(UTC).date().isoformat()
    assert (asking.chat_template, asking.HasField("prefix")) == ("", False)


async def test_turns_need_the_bases_chat_template_and_a_prompt_does_not(bench: Bench) -> None:
    bench.peers.models[BASE].has_chat_template = False
    with pytest.raises(FailedPrecondition, match="send prompt instead of conversation") as caught:
        await bench.ask(wish())
    assert caught.value.reason == Reason.CHAT_TEMPLATE_MISSING
    pieces = await bench.pieces(wish(prompt="hi"))
    assert "".join(piece.text for piece in pieces) == "yes"
    assert {piece.template_source for piece in pieces} == {0}, "no template was asked with"
    assert bench.orders[-1].prompt == "hi"


@pytest.mark.parametrize("name", [BASE, TUNED])
async def test_neither_model_may_be_less_than_ready(bench: Bench, name: str) -> None:
    bench.peers.models[name].state = Model.STATE_FAILED
    with pytest.raises(FailedPrecondition, match=f"{name} must be READY, it is FAILED"):
        await bench.ask(wish())
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
        await bench.ask(wish(model))


async def scored(bench: Bench, request: ScoreTextsRequest, *, knows: bool = True) -> ScoreTextsResponse:
    """Have texts scored by a worker that knows that, or by an older one, which takes the order for an empty prompt."""

    async def answer() -> None:
        async for message in bench.exchange.take("w", 1):
            bench.orders.append(message.order)
            scores = [TextScore(log_probability=-1.0, num_tokens=2)] * len(message.order.texts.texts)
            piece = Piece(
                generation=message.order.generation,
                finish_reason=FINISH_REASON_STOP,
                scores=scores if knows else (),
            )
            await bench.exchange.push(piece)

    service = GenerationService(bench.exchange, bench.peers, bench.peers, bench.tokens)
    worker = asyncio.create_task(answer())
    await asyncio.sleep(0)
    try:
        return await service.score(request)
    finally:
        worker.cancel()


async def test_texts_are_scored_by_a_worker_that_hears_how_much_the_base_reads(bench: Bench) -> None:
    bench.peers.models[BASE].context_length = 77
    texts = [TextToScore(context="a", continuation=" b"), TextToScore(continuation="c", rolling=True)]
    found = await scored(bench, ScoreTextsRequest(model=ALIAS, texts=texts))
    assert [one.num_tokens for one in found.scores] == [2, 2]
    (order,) = bench.orders
    assert list(order.texts.texts) == texts
    assert (order.context_length, order.adapter.name, order.base_model.name) == (77, TUNED, BASE)
    assert set(bench.tokens.verify(order.token).resources) == {BASE, TUNED}


async def test_a_worker_that_knows_no_scores_is_told_of(bench: Bench) -> None:
    request = ScoreTextsRequest(model=BASE, texts=[TextToScore(continuation="c")])
    with pytest.raises(Internal, match="must give 1 scores, it gave none; is it an older one"):
        await scored(bench, request, knows=False)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "texts: must hold 1 to 64 texts, got 0"),
        ([TextToScore(continuation="c")] * 65, "texts: must hold 1 to 64 texts, got 65"),
        ([TextToScore(context="c")], r"texts\[0\].continuation: must be at most 262144 characters, got 0"),
        (
            [TextToScore(context="a", continuation="b", rolling=True)],
            r"texts\[0\].context: must be empty where",
        ),
    ],
)
async def test_texts_that_can_never_be_scored_are_refused(
    bench: Bench, texts: list[TextToScore], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await scored(bench, ScoreTextsRequest(model=BASE, texts=texts))
    assert not bench.orders
