"""Interactive generation: take orders, answer them piece by piece, stop when nobody listens."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol

import grpc

from luthier.errors import (
    Cancelled,
    FailedPrecondition,
    Failure,
    Internal,
    InvalidArgument,
    LuthierError,
    NotFound,
    Reason,
    Unavailable,
)
from luthier.errors.status import failure_to_status
from luthier.evaluation.generation.rules import is_last
from luthier.evaluation.precision import precision_of
from luthier.evaluation.worker.asking import Asker, Before
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.sample_values import sample_values
from luthier.evaluation.worker.text_scores import scored_texts
from luthier.evaluation.worker.valuing import Valuer, valuing
from luthier.lm.generate import GenerationRequest
from luthier.text.rendering import RenderingError
from luthier.text.templates import TemplateError
from luthier.v1 import chat_pb2, evaluation_pb2
from luthier.work.cache import BlobCache
from luthier.work.limited import Check
from luthier.work.link import WorkerLink
from luthier.work.retry import Token
from luthier.worker.v1 import task_pb2, worker_service_pb2

SLOTS = 4
_AGAIN_SECONDS = 0.5
_BASE_SECONDS = 2.0
"""How long a slot is held while another base model is in use."""
_RETRY_SECONDS = 1.0
_ENDS = frozenset({Reason.CRASHED, Reason.STALLED, Reason.OUT_OF_MEMORY})
"""Why there may be no answer though nothing is wrong with what was asked."""
_logger = logging.getLogger(__name__)
Piece = worker_service_pb2.PushGenerationRequest


class Answering(Protocol):
    """Turns an order into the pieces of its answer."""

    def answer(self, order: worker_service_pb2.GenerationOrder, stopped: threading.Event) -> Iterator[Piece]:
        """Yield the pieces, the last one with a finish reason; raise Cancelled soon after `stopped` is set."""
        ...


class ModelAnswers:
    """Answers orders with the models in memory."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def answer(self, order: worker_service_pb2.GenerationOrder, stopped: threading.Event) -> Iterator[Piece]:
        """Yield the pieces of an answer.

        Raises:
            Unavailable: CRASHED, STALLED or OUT_OF_MEMORY; the model's process ended, and the next order gets another.
            ResourceExhausted: OUT_OF_MEMORY, it has none for this order, and goes on.
            LuthierError: the models cannot be loaded, or the prompt does not fit.
            Cancelled: `stopped` was set.
        """
        loaded: LoadedModel | None = None
        precision = precision_of(order.base_precision)

        def check() -> None:
            if stopped.is_set():
                raise Cancelled(f"generation {order.generation} was stopped")

        def token() -> str:
            return order.token

        try:
            if order.WhichOneof("input") == "samples":
                with valuing(
                    self._models, _reward_model(order), token, check, wait_seconds=_BASE_SECONDS
                ) as valuer:
                    loaded = valuer.loaded
                    yield _values(order, valuer)
                return
            with self._models.base(
                order.base_model, token, check, precision=precision, wait_seconds=_BASE_SECONDS
            ) as loaded:
                yield from self._answered(order, loaded, token, check)
        except LuthierError as error:
            goes_on = loaded is not None and loaded.engine.ended is None
            is_too_large = goes_on and error.reason == Reason.OUT_OF_MEMORY
            if is_too_large or error.reason not in _ENDS:
                raise
            raise _try_again(error) from error

    def _answered(
        self, order: worker_service_pb2.GenerationOrder, loaded: LoadedModel, token: Token, check: Check
    ) -> Iterator[Piece]:
        adapter = order.adapter if order.HasField("adapter") else None
        with self._models.adapter(loaded, adapter, token, check) as name:
            if order.WhichOneof("input") == "texts":
                yield _scores(loaded, order, name, check)
                return
            prompt, stops = _prompt(loaded.asker(order.asking, check), order)
            request = GenerationRequest(
                request_id=order.generation,
                prompts=(prompt,),
                max_new_tokens=order.max_new_tokens,
                adapter=name,
                temperature=order.temperature,
                top_p=order.top_p,
                seed=order.seed,
                stop_token_ids=stops,
            )
            yield from _pieces(loaded, request, check)


def _scores(
    loaded: LoadedModel, order: worker_service_pb2.GenerationOrder, adapter: str | None, check: Check
) -> Piece:
    asker = loaded.asker(order.asking, check)
    scores = scored_texts(asker, loaded.engine, adapter, order.texts.texts, order.context_length, check)
    return Piece(
        generation=order.generation,
        scores=scores,
        finish_reason=evaluation_pb2.FINISH_REASON_STOP,
        num_prompt_tokens=sum(score.num_tokens for score in scores),
    )


def _reward_model(order: worker_service_pb2.GenerationOrder) -> task_pb2.RewardModel:
    return task_pb2.RewardModel(
        base_model=order.base_model,
        adapter=order.adapter if order.HasField("adapter") else None,
        asking=order.asking,
        base_precision=order.base_precision,
        context_length=order.context_length,
    )


def _values(order: worker_service_pb2.GenerationOrder, valuer: Valuer) -> Piece:
    return Piece(
        generation=order.generation,
        values=sample_values(valuer, order.samples.samples),
        finish_reason=evaluation_pb2.FINISH_REASON_STOP,
    )


def _pieces(loaded: LoadedModel, request: GenerationRequest, check: Check) -> Iterator[Piece]:
    with closing(loaded.engine.generate(request, check)) as events:
        for event in events:
            reason = event.finish_reason or "UNSPECIFIED"
            yield Piece(
                generation=request.request_id,
                text=event.text,
                finish_reason=evaluation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"),
                num_prompt_tokens=len(request.prompts[0]),
                num_generated_tokens=event.num_generated,
            )


def _try_again(error: LuthierError) -> Unavailable:
    return Unavailable(
        f"the answer was cut off, try again: {error.message}",
        reason=error.reason,
        metadata=error.metadata,
        retry_after_seconds=_RETRY_SECONDS,
    )


async def serve_generations(link: WorkerLink, cache: BlobCache, answering: Answering) -> None:
    """Take orders until cancelled, through every absence of the service. `cache` is the worker's own."""
    del cache
    with ThreadPoolExecutor(max_workers=SLOTS, thread_name_prefix="generation") as threads:
        while True:
            await _take_until_the_stream_ends(link, answering, threads)
            await asyncio.sleep(_AGAIN_SECONDS)


async def _take_until_the_stream_ends(
    link: WorkerLink, answering: Answering, threads: ThreadPoolExecutor
) -> None:
    try:
        await _take(link, answering, threads)
    except grpc.aio.AioRpcError as error:
        _logger.info("generation stream ended, opening it again", extra={"status": error.code().name})
        if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
            await link.register()


async def _take(link: WorkerLink, answering: Answering, threads: ThreadPoolExecutor) -> None:
    request = worker_service_pb2.TakeGenerationsRequest(worker=link.worker_id, slots=SLOTS)
    running: dict[str, asyncio.Task[None]] = {}

    def begin(order: worker_service_pb2.GenerationOrder) -> None:
        task = asyncio.create_task(_answer(link, answering, order, threads))
        running[order.generation] = task
        task.add_done_callback(lambda _: running.pop(order.generation))

    try:
        async for message in link.stub.TakeGenerations(request, metadata=link.metadata):
            if message.WhichOneof("message") == "order":
                begin(message.order)
            elif message.cancel_generation in running:
                running[message.cancel_generation].cancel()
    finally:
        for task in running.values():
            task.cancel()
        # Their threads must have let go of the models first, else closing down waits for whole answers.
        await asyncio.gather(*running.values(), return_exceptions=True)


async def _answer(
    link: WorkerLink,
    answering: Answering,
    order: worker_service_pb2.GenerationOrder,
    threads: ThreadPoolExecutor,
) -> None:
    """Run one order in a thread and push its pieces, those that wait together as one."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    stopped = threading.Event()

    def produce() -> None:
        for piece in _pieces_or_failure(answering, order, stopped):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    work = loop.run_in_executor(threads, produce)
    try:
        last = False
        while not last:
            piece = await pieces.get()
            while not is_last(piece) and not pieces.empty():
                following = pieces.get_nowait()
                following.text = piece.text + following.text
                piece = following
            last = is_last(piece)
            await link.call(link.stub.PushGeneration, piece)
    except NotFound:
        _logger.info("nobody waits for a generation any more", extra={"generation": order.generation})
    except LuthierError:
        _logger.exception("the service refused a piece of a generation")
    finally:
        stopped.set()
        await asyncio.shield(work)


def _pieces_or_failure(
    answering: Answering, order: worker_service_pb2.GenerationOrder, stopped: threading.Event
) -> Iterator[Piece]:
    try:
        yield from answering.answer(order, stopped)
    except LuthierError as error:
        yield _failed(order, error)
    except Exception as error:  # the caller must hear of it, whatever it is
        _logger.exception("a generation failed unexpectedly")
        yield _failed(order, Internal(f"{type(error).__name__}: {error}", reason=Reason.INTERNAL))


def _failed(order: worker_service_pb2.GenerationOrder, error: LuthierError) -> Piece:
    return Piece(generation=order.generation, error=failure_to_status(Failure.of(error)))


def _prompt(
    asker: Asker, order: worker_service_pb2.GenerationOrder
) -> tuple[tuple[int, ...], frozenset[int]]:
    try:
        if order.WhichOneof("input") == "prompt":
            return asker.raw(order.prompt), asker.stops().token_ids
        messages = [_turn(message) for message in order.conversation.messages]
        tools = _json_list("conversation.tools_json", order.conversation.tools_json)
        prompt = asker.conversation(messages, tools)
        stops = asker.stops(Before(messages=messages, tools=tools))
        if stops.unknown:
            _logger.warning("how the template ends a turn is not known", extra={"why": stops.unknown})
        return prompt, stops.token_ids
    except RenderingError as error:
        raise FailedPrecondition(str(error), reason=error.reason) from error
    except TemplateError as error:
        raise InvalidArgument(str(error), reason=Reason.TEMPLATE_INVALID) from error


def _turn(message: chat_pb2.ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls_json:
        turn["tool_calls"] = _json_list("tool_calls_json", message.tool_calls_json)
    return turn


def _json_list(field: str, text: str) -> list[Any]:
    if not text:
        return []
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{field} must be a JSON array: {error}") from error
    if not isinstance(value, list):
        raise InvalidArgument(f"{field} must be a JSON array, got {text[:100]!r}")
    return value
