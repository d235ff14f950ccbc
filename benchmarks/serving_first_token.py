"""Time to the first token of GenerateText through real services, idle and beside an evaluation. For `serving.py`.

The Evaluation service, its worker and the base model's process are processes of their own; the bare model reads as
many tokens here, in turns with the calls, while nothing else runs. Prompts begin differently, so that nothing of them
is known before.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_check_job import prepare
from service_processes import running

from luthier.client import Client
from luthier.lm.cache import BatchCache
from luthier.lm.load import load_model
from luthier.lm.passes import Pass, forward_together
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm

_WORDS = (
    "order",
    "shop",
    "train",
    "box",
    "label",
    "late",
    "sent",
    "came",
    "back",
    "with",
    "the",
    "one",
    "by",
    "and",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is measured.

    Attributes:
        calls: of each kind.
        words: of a prompt.
        answer_tokens: of each answer of the evaluation beside.
    """

    calls: int
    words: int
    answer_tokens: int


_MOST_EVALUATIONS = 20
SIZE = Size(calls=15, words=360, answer_tokens=96)
FAST = Size(calls=2, words=40, answer_tokens=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """Seconds to the first token, each several times.

    Attributes:
        num_tokens: of the prompts, at least.
        bare: the model reads the prompt.
        idle: GenerateText, nothing else running.
        busy: GenerateText while an evaluation runs on the same base model.
    """

    num_tokens: int
    bare: Sequence[float]
    idle: Sequence[float]
    busy: Sequence[float]

    def summary(self) -> dict[str, float]:
        """The figures that releases are compared by."""
        bare = statistics.median(self.bare)
        return {
            "first_token_idle": round(statistics.median(self.idle) / bare, 3),
            "first_token_busy": round(statistics.median(self.busy) / bare, 3),
            "first_token_busy_worst": round(max(self.busy) / bare, 3),
        }

    def details(self) -> dict[str, Any]:
        """All that was measured."""
        return asdict(self)


def measure(model: Path, home: Path, size: Size = SIZE) -> FirstTokens:
    """Measure calls of each kind with a model."""
    tokenizer, bare_model = TokenizerBundle.load(model), load_model(model)
    draw = random.Random(5)
    bare: list[float] = []
    idle: list[float] = []
    busy: list[float] = []
    lengths = []

    def text() -> str:
        return prompt_of(draw, size)

    def read() -> float:
        ids = tokenizer.encode(text()).ids
        lengths.append(len(ids))
        began = time.perf_counter()
        with torch.inference_mode():
            cache = BatchCache(bare_model.config.num_hidden_layers, len(ids))
            one = Pass(torch.tensor([ids]), torch.arange(len(ids))[None], cache)
            forward_together(bare_model, [one])
        return time.perf_counter() - began

    with running(home, "cpu") as stack, stack.client() as client:
        rendering = prepare(stack, client, model)
        version = client.renderings.get(rendering).dataset_version
        read()
        first_token(client, text())
        for _ in range(size.calls):
            bare.append(read())
            idle.append(first_token(client, text()))
        for _ in range(_MOST_EVALUATIONS):
            if len(busy) == size.calls:
                break
            evaluation = begun_evaluation(client, version, size)
            while len(busy) < size.calls and (spent := beside(client, evaluation, text(), draw)):
                busy.append(spent)
        if len(busy) < size.calls:
            raise RuntimeError(f"{_MOST_EVALUATIONS} evaluations ended beside {len(busy)} calls")
        client.evaluations.cancel(evaluation)
    return FirstTokens(num_tokens=min(lengths), bare=bare, idle=idle, busy=busy)


def prompt_of(draw: random.Random, size: Size) -> str:
    """Return a prompt that begins as no other does."""
    return " ".join(draw.choices(_WORDS, k=size.words))


def begun_evaluation(client: Client, version: str, size: Size) -> str:
    """Begin an evaluation; returns its name once answers are drawn."""
    wanted = Evaluation(
        dataset_version=version,
        arms=[
            EvaluationArm(arm_id=f"shots-{shots}", model="base", num_shots=shots) for shots in (0, 3, 1, 2)
        ],
        max_new_tokens=size.answer_tokens,
    )
    name = client.evaluations.create(wanted).name
    for event in client.evaluations.watch(name):
        if event.progress.total:
            break
    return name


def beside(client: Client, evaluation: str, prompt: str, draw: random.Random) -> float | None:
    """Seconds until the first piece of an answer beside an evaluation; None: it had ended by then."""
    time.sleep(draw.uniform(0.1, 0.4))
    spent = first_token(client, prompt)
    is_beside = client.evaluations.get(evaluation).state == Evaluation.STATE_RUNNING
    return spent if is_beside else None


def first_token(client: Client, prompt: str) -> float:
    """Seconds until the first piece of an answer."""
    began = time.perf_counter()
    with client.generate("base", prompt, max_new_tokens=2) as pieces:
        next(iter(pieces))
    return time.perf_counter() - began
