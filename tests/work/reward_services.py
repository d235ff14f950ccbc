"""Reward services for tests: each answer is what a function makes of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from luthier.v1.reward_service_pb2 import ScoreRequest, ScoreResponse
from luthier.v1.reward_service_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server

Score = Callable[[ScoreRequest, Any], ScoreResponse]


class Rewards(RewardServiceServicer):
    """Answers with a function, and keeps what was asked."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.requests: list[ScoreRequest] = []

    def Score(self, request: ScoreRequest, context: Any) -> ScoreResponse:  # noqa: N802
        self.requests.append(request)
        return self.score(request, context)


@contextmanager
def rewarding(score: Score, port: int = 0) -> Iterator[tuple[str, Rewards]]:
    """Serve for the length of a block; yields the address and the servicer."""
    rewards = Rewards(score)
    server = grpc.server(ThreadPoolExecutor(4))
    add_RewardServiceServicer_to_server(rewards, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}", rewards
    finally:
        server.stop(grace=None).wait()
