"""Answers, scores and values are computed on whatever device the model is on: nothing is left on the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.device_spy import DeviceSpy
from tests.lm.engine_requests import PROMPTS, request, run, with_adapter
from tests.lm.test_load import saved

from luthier.kernels.dequantise import is_quantised
from luthier.kernels.tables import force_impl
from luthier.lm.divergence import divergences, write_distributions
from luthier.lm.engine import Engine
from luthier.lm.load import load_model
from luthier.lm.precision import Precision
from luthier.lm.quantise import _nearest_codes
from luthier.lm.scoring import sequence_logprobs
from luthier.training.recipes.valuing import Valuer

ModelMaker = Callable[..., Any]
CPU = torch.device("cpu")
FAMILIES = ["llama", "qwen3", "mistral"]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Take the plain formulas: the kernels for the processor have tensors of their own there.

    NF4's codes of every number are made once for a device: a spy must see it.
    """
    _nearest_codes.cache_clear()
    force_impl("eager")
    yield
    force_impl("auto")


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"shared_prefix": (30, 31, 32)},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "want_logprobs": True, "num_samples": 2},
        {"adapter": "a", "stop_token_ids": frozenset({5})},
    ],
    ids=["greedy", "behind a prefix", "from a nucleus", "samples with log-probabilities", "with an adapter"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_leave_nothing_on_the_processor(
    tiny_model: ModelMaker, family: str, asked: dict[str, Any]
) -> None:
    model = tiny_model(family)
    if "adapter" in asked:
        with_adapter(model, "a", 1)
    there, _ = run(Engine(model), request(**asked))
    with DeviceSpy() as spy:
        model.to(CPU)
        here, _ = run(Engine(model), request(**asked))
    assert list(spy.found) == []
    assert spy.num_on_device > 100
    assert here == there


def test_scores_and_values_leave_nothing_on_the_processor(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    masks = [[place > 0 for place in range(len(one))] for one in PROMPTS]
    with DeviceSpy() as spy:
        model.to(CPU)
        scores = sequence_logprobs(model, PROMPTS, masks)
        head = torch.ones(1, model.config.hidden_size).to(CPU)
        values = Valuer(model=model, head=head).values(PROMPTS, 64)
    assert list(spy.found) == []
    assert spy.num_on_device > 50
    assert len(scores) == len(values) == len(PROMPTS)


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_answers_beside_a_quantised_base_leave_nothing_on_the_processor(
    tiny_model: ModelMaker, tmp_path: Path, precision: Precision
) -> None:
    folder = saved(tiny_model(), tmp_path)
    with DeviceSpy() as spy:
        model = load_model(folder, device=CPU, precision=precision)
        with_adapter(model, "a", 1)
        engine = Engine(model)
        answers, _ = run(engine, request(adapter="a"))
    assert is_quantised(model.model.layers[0].mlp.up_proj.weight)
    assert list(spy.found) == []
    assert spy.num_on_device > 100
    assert engine.take_failures() == {}
    assert len(answers) == len(PROMPTS)


def test_divergences_leave_nothing_on_the_processor(tiny_model: ModelMaker, tmp_path: Path) -> None:
    masks = [[place > 0 for place in range(len(one))] for one in PROMPTS]
    model, other = tiny_model(), tiny_model(hidden_act="gelu")
    with DeviceSpy() as spy:
        for one in (model, other):
            one.to(CPU)
        write_distributions(model, PROMPTS, masks, tmp_path / "kept")
        found = divergences(other, PROMPTS, masks, tmp_path / "kept")
    assert list(spy.found) == []
    assert spy.num_on_device > 50
    assert sum(one.nats for one in found) > 0
