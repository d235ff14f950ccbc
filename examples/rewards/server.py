"""A reward service in a process of its own: gives answers to sums a score.

    python examples/rewards/server.py --port 50051

It needs the package luthier-client alone. Write your own by changing `reward`: what it returns is the score, what it
raises is an error of that sample and never a score.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from luthier.v1.grader_pb2 import Sample
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.v1.reward_service_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server

WORDS_FOR_FREE = 20


def reward(item: Mapping[str, Any], answer: str) -> float:
    """Return 1 for the right sum as the last number of a short answer, less for more words than are needed.

    Raises ValueError when the record says no sum: nothing can be right then.
    """
    if not isinstance(item.get("sum"), int):
        raise ValueError(f"the record must have a whole number `sum`, it has {', '.join(item) or 'nothing'}")
    numbers = re.findall(r"-?\d+", answer)
    if not numbers or int(numbers[-1]) != item["sum"]:
        return 0.0
    return min(1.0, WORDS_FOR_FREE / len(answer.split()))


def scored(sample: Sample) -> SampleScore:
    """Return the score of a sample, or why it has none."""
    try:
        item = json.loads(sample.item_json or "{}")
        return SampleScore(score=reward(item, sample.output_text))
    except ValueError as error:
        return SampleScore(error=str(error))


class Rewards(RewardServiceServicer):
    """What Luthier calls. Batches come several at a time: keep no state between them, or lock it."""

    def Score(self, request: ScoreRequest, context: grpc.ServicerContext) -> ScoreResponse:  # noqa: N802, ARG002, D102
        return ScoreResponse(scores=[scored(sample) for sample in request.samples])


def main() -> None:
    """Serve on loopback until SIGTERM or Ctrl-C; port 0 takes a free one, which is printed."""
    parser = argparse.ArgumentParser(description="Score answers to sums.")
    parser.add_argument("--port", type=int, default=50051)
    port = parser.parse_args().port
    server = grpc.server(ThreadPoolExecutor(4))
    add_RewardServiceServicer_to_server(Rewards(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    print(f"serving rewards at 127.0.0.1:{bound}", flush=True)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    stopping.wait()
    server.stop(grace=5).wait()


if __name__ == "__main__":
    main()
