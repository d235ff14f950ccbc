"""Loading, answers, draws and scores on a GPU are those of the processor. Needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lm.engine_requests import PROMPTS, request, run, with_adapter
from tests.lm.test_load import saved

from luthier.lm.device import choose_device
from luthier.lm.divergence import divergences, write_distributions
from luthier.lm.engine import Engine
from luthier.lm.load import load_model
from luthier.lm.precision import Precision
from luthier.lm.scoring import sequence_logprobs

ModelMaker = Callable[..., Any]
# cuBLAS reads it when the GPU is opened.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
GPU = torch.device("cuda", 0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


def test_the_gpu_is_found_and_works() -> None:
    assert choose_device("auto") == GPU


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_processor(tiny_model: ModelMaker, tmp_path: Path, family: str) -> None:
    folder = saved(tiny_model(family), tmp_path)
    models = [load_model(folder, torch.float32, device) for device in ("cpu", GPU)]
    assert {one.device for one in [*models[1].parameters(), *models[1].buffers()]} == {GPU}
    for model in models:
        with_adapter(model, "a", 1)
    for asked in ({}, {"shared_prefix": (30, 31, 32)}, {"adapter": "a"}):
        there, here = (run(Engine(model), request(**asked)) for model in models)
        assert here == there, asked


@pytest.mark.usefixtures("deterministic")
def test_draws_are_the_same_each_time(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = load_model(saved(tiny_model(), tmp_path), device=GPU)
    all_of_it: dict[str, Any] = {"temperature": 1.0, "want_logprobs": True, "num_samples": 4}
    nucleus: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    for asked in (all_of_it, nucleus):
        first, second = (run(Engine(model), request(**asked)) for _ in range(2))
        assert first == second
    assert len({tuple(answer) for answer in first[0].values()}) > 1


def test_scores_are_those_of_the_processor(tiny_model: ModelMaker, tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path)
    masks = [[True] * len(one) for one in PROMPTS]
    there, here = (
        [one.logprob for one in sequence_logprobs(load_model(folder, torch.float32, device), PROMPTS, masks)]
        for device in ("cpu", GPU)
    )
    assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_scores_beside_a_quantised_base_are_those_of_the_processor(
    tiny_model: ModelMaker, tmp_path: Path, precision: Precision
) -> None:
    folder = saved(tiny_model(), tmp_path)
    masks = [[True] * len(one) for one in PROMPTS]
    models = [load_model(folder, device=device, precision=precision) for device in ("cpu", GPU)]
    there, here = ([one.logprob for one in sequence_logprobs(model, PROMPTS, masks)] for model in models)
    assert here == pytest.approx(there, rel=0.02)
    write_distributions(models[0], PROMPTS, masks, tmp_path / "kept")
    found = divergences(models[1], PROMPTS, masks, tmp_path / "kept")
    assert all(abs(one.nats) < 0.01 * max(1, one.num_tokens) for one in found)
