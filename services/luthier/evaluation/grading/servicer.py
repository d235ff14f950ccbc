"""Grading on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from luthier.evaluation.grading.service import GradingService
from luthier.v1 import evaluation_service_pb2

Context = grpc.aio.ServicerContext[Any, Any]


class GradingServicer:
    """The graders' part of EvaluationService."""

    def __init__(self, grading: GradingService) -> None:
        self._grading = grading

    async def GradeSamples(
        self, request: evaluation_service_pb2.GradeSamplesRequest, context: Context
    ) -> AsyncIterator[evaluation_service_pb2.GradeSamplesResponse]:
        """Stream the grades of samples."""
        async for grades in self._grading.grade(request):
            yield evaluation_service_pb2.GradeSamplesResponse(grades=grades)
