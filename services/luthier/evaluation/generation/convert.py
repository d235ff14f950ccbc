"""Orders and pieces between plain values and the wire."""

from __future__ import annotations

from luthier.evaluation.evaluations.convert import asking_to_proto
from luthier.evaluation.generation.domain import (
    DEFAULT_NEW_TOKENS,
    FinishReason,
    ModelAt,
    Order,
    Piece,
    Turn,
    Wish,
)
from luthier.v1 import chat_pb2, evaluation_pb2, evaluation_service_pb2
from luthier.work.convert import status_to_failure
from luthier.worker.v1 import task_pb2, worker_service_pb2


def wish_from_proto(request: evaluation_service_pb2.GenerateTextRequest) -> Wish:
    """Read what a caller asks for, defaults filled in."""
    turns = tuple(
        Turn(
            role=message.role,
            content=message.content,
            name=message.name,
            tool_calls_json=message.tool_calls_json,
            tool_call_id=message.tool_call_id,
        )
        for message in request.conversation.messages
    )
    return Wish(
        model=request.model,
        turns=turns,
        tools_json=request.conversation.tools_json,
        prompt=request.prompt,
        max_new_tokens=request.max_new_tokens or DEFAULT_NEW_TOKENS,
        temperature=request.temperature,
        top_p=request.top_p or 1.0,
        seed=request.seed,
    )


def order_to_proto(order: Order) -> worker_service_pb2.GenerationOrder:
    """Write an order for a worker."""
    message = worker_service_pb2.GenerationOrder(
        generation=order.generation_id,
        base_model=_reference(order.base_model),
        adapter=_reference(order.adapter) if order.adapter is not None else None,
        max_new_tokens=order.max_new_tokens,
        temperature=order.temperature,
        top_p=order.top_p,
        seed=order.seed,
        token=order.token,
        asking=asking_to_proto(order.asking),
    )
    if not order.turns:
        message.prompt = order.prompt
        return message
    for turn in order.turns:
        message.conversation.messages.append(
            chat_pb2.ChatMessage(
                role=turn.role,
                content=turn.content,
                name=turn.name,
                tool_calls_json=turn.tool_calls_json,
                tool_call_id=turn.tool_call_id,
            )
        )
    message.conversation.tools_json = order.tools_json
    return message


def piece_from_proto(request: worker_service_pb2.PushGenerationRequest) -> Piece:
    """Read a piece that a worker brought."""
    name = evaluation_pb2.FinishReason.Name(request.finish_reason).removeprefix("FINISH_REASON_")
    return Piece(
        generation_id=request.generation,
        text=request.text,
        finish_reason=FinishReason(name) if name != "UNSPECIFIED" else None,
        num_prompt_tokens=request.num_prompt_tokens,
        num_generated_tokens=request.num_generated_tokens,
        failure=status_to_failure(request.error) if request.HasField("error") else None,
    )


def piece_to_proto(piece: Piece) -> evaluation_service_pb2.GenerateTextResponse:
    """Write a piece for the caller."""
    return evaluation_service_pb2.GenerateTextResponse(
        text=piece.text,
        finish_reason=finish_reason_to_proto(piece.finish_reason),
        num_prompt_tokens=piece.num_prompt_tokens if piece.is_last else 0,
        num_generated_tokens=piece.num_generated_tokens,
        template_source=evaluation_pb2.TemplateSource.Value(f"TEMPLATE_SOURCE_{piece.template_source}"),
    )


def finish_reason_to_proto(reason: FinishReason | None) -> evaluation_pb2.FinishReason.ValueType:
    """Write why generation ended; None while it goes on."""
    return evaluation_pb2.FinishReason.Value(f"FINISH_REASON_{reason or 'UNSPECIFIED'}")


def _reference(model: ModelAt) -> task_pb2.ModelReference:
    return task_pb2.ModelReference(name=model.name, digest=model.digest)
