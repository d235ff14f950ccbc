"""Generation on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from luthier.evaluation.generation.service import GenerationService
from luthier.v1 import evaluation_service_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer:
    """The generations' part of EvaluationService."""

    def __init__(self, generations: GenerationService) -> None:
        self._generations = generations

    async def GenerateText(
        self, request: evaluation_service_pb2.GenerateTextRequest, context: Context
    ) -> AsyncIterator[evaluation_service_pb2.GenerateTextResponse]:
        """Stream an answer."""
        async for piece in self._generations.generate(request):
            yield piece

    async def ScoreTexts(
        self, request: evaluation_service_pb2.ScoreTextsRequest, context: Context
    ) -> evaluation_service_pb2.ScoreTextsResponse:
        """Say how likely texts are."""
        return await self._generations.score(request)
