"""Answers from a base model in 8 or 4 bits, as the adapter's job had it or as the caller says."""

from __future__ import annotations

import asyncio
import math
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.here import Here
from tests.evaluation.worker.conftest import Bench

from luthier.evaluation.worker.order import LoadOrder
from luthier.evaluation.worker.room import Room
from luthier.lm.adapter_files import load_adapter
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import load_model
from luthier.lm.lora import use_adapter
from luthier.lm.precision import Precision
from luthier.lm.scoring import sequence_logprobs
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.v1 import evaluation_pb2
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_INT8,
    BASE_PRECISION_NF4,
)

PERPLEXITY = evaluation_pb2.EVALUATION_METRIC_PERPLEXITY


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """What base models were loaded in."""
    found: list[Precision] = []
    real = Here.__init__

    def init(here: Here, order: LoadOrder) -> None:
        found.append(order.precision)
        real(here, order)

    monkeypatch.setattr(Here, "__init__", init)
    return found


def said(folders: dict[str, Path], precision: Precision) -> str:
    """What the tuned model says, without a service."""
    model = load_model(folders["base"], precision=precision)
    load_adapter(model, folders["tuned"], "a")
    bundle = TokenizerBundle.load(folders["base"])
    engine = Engine(model)
    prompt = (*bundle.prefix_ids, *bundle.encode("what colour").ids)
    engine.submit(GenerationRequest(request_id="r", prompts=(prompt,), max_new_tokens=16, adapter="a"))
    tokens: list[int] = []
    while engine.wait(0):
        tokens += [token for event in engine.step() for token in event.token_ids]
    return bundle.decode(tokens)


async def test_a_tuned_model_is_asked_beside_what_it_was_trained_beside(
    site: Any, model_folders: dict[str, Path], loaded: list[Precision]
) -> None:
    site.models.precisions["tuned"] = BASE_PRECISION_NF4
    async with site.worker():
        found = [
            await site.said("tuned", "what colour", max_new_tokens=16, **said)
            for said in (
                {},
                {"base_precision": BASE_PRECISION_BFLOAT16},
                {"base_precision": BASE_PRECISION_INT8},
            )
        ]
    assert loaded == ["NF4", "BFLOAT16", "INT8"]
    assert found == [said(model_folders, one) for one in loaded]
    assert found[0] != found[1], "4 bits of random weights change what is said"


async def test_an_evaluation_asks_all_arms_beside_one(
    site: Any, model_folders: dict[str, Path], loaded: list[Precision]
) -> None:
    site.models.precisions["tuned"] = BASE_PRECISION_NF4
    async with site.worker():
        made = await site.evaluate(
            arms=[("zero", "base", 0), ("tuned", "tuned", 0)], metrics=[PERPLEXITY], max_new_tokens=4
        )
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED, done.error
    assert done.base_precision == BASE_PRECISION_NF4
    assert loaded == ["NF4"]
    model = load_model(model_folders["base"], precision="NF4")
    load_adapter(model, model_folders["tuned"], "a")
    renderer = Renderer(TokenizerBundle.load(model_folders["base"]), today=date.today())
    for result, adapter in zip(done.arm_results, (None, "a"), strict=True):
        nll = num_tokens = 0.0
        for record in site.data.records["TEST"]:
            answer = renderer.answer(record)
            with use_adapter(model, adapter):
                (score,) = sequence_logprobs(model, [answer.input_ids], [answer.loss_mask])
            nll, num_tokens = nll - score.logprob, num_tokens + score.num_tokens
        (measured,) = (one.value for one in result.scores if one.score == "perplexity")
        assert measured == pytest.approx(math.exp(nll / num_tokens), rel=0.02)


async def test_one_base_model_in_two_precisions_is_there_twice(bench: Bench) -> None:
    plenty = Room(fits=lambda needed_bytes, held_bytes: True, is_short=lambda: False)

    def use() -> None:
        base = bench.reference("base")
        with (
            closing(bench.models(plenty)) as models,
            models.base(base, bench.token) as first,
            models.base(base, bench.token, precision="INT8") as second,
            models.base(base, bench.token, precision="INT8") as third,
        ):
            assert first is not second
            assert second is third

    await asyncio.to_thread(use)
