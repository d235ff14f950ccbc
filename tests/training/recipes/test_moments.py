"""Moments of 8 bits and in main memory: what has them, that runs learn with them, and go on with the same bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.test_engine import (
    CPU,
    OPTIMISER,
    RATES,
    adapter_engine,
    batch_of,
    learnt,
    trained,
)
from tests.training.recipes.test_footprint import ALL, PASS
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import DataLoss
from luthier.kernels.adamw_8bit import BLOCK
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes import footprint, moments
from luthier.training.recipes.engine import BETAS, EPSILON, Engine, OptimiserSettings
from luthier.training.recipes.footprint import has_8_bits, moments_bytes
from luthier.training.recipes.moments import MOMENTS, HeldAdamW
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import AllWeights

ModelMaker = Callable[..., PreTrainedModel]
EIGHT = replace(OPTIMISER, states="INT8")
OFFLOADED = replace(OPTIMISER, states="OFFLOADED")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of the tiny model are large enough."""
    monkeypatch.setattr(footprint, "_LEAST_IN_8_BITS", 1024)


@pytest.fixture
def batches(token_rows: Callable[..., list[Any]]) -> list[list[PackedBatch]]:
    rows = token_rows(30)
    return [[batch_of(rows[at : at + 3]) for at in (start, start + 3)] for start in range(0, 30, 6)]


def engine_of(model: PreTrainedModel, settings: Any = EIGHT) -> Engine:
    return Engine(AllWeights(model), settings, CPU)


def test_large_matrices_have_codes_and_scales_and_others_float32(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    engine = engine_of(tiny_llama(torch.bfloat16))
    before = {name: (one.shape, one.dtype) for name, one in engine.optimiser_state().items()}
    trained(engine, batches)
    state = engine.optimiser_state()
    assert {name: (one.shape, one.dtype) for name, one in state.items()} == before
    for name, parameter in engine.weights.parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if has_8_bits(parameter.numel()):
                codes, scale = (state[f"{name}.{moment}.{part}"] for part in ("codes", "scale"))
                assert (codes.dtype, codes.shape) == (torch.uint8, parameter.shape)
                assert scale.shape == (parameter.numel() // BLOCK,)
                assert bool(codes.any())
            else:
                assert state[f"{name}.{moment}"].shape == parameter.shape
    assert "model.layers.0.mlp.up_proj.weight.exp_avg.codes" in state
    assert "model.norm.weight.exp_avg" in state


def test_a_run_learns_as_with_moments_of_float32(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    losses = [trained(engine_of(tiny_llama(), one), batches) for one in (OPTIMISER, EIGHT)]
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_moments_in_main_memory_change_no_bit(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    made = []
    for settings in (OPTIMISER, OFFLOADED):
        engine = engine_of(tiny_llama(torch.bfloat16), settings)
        losses = trained(engine, batches)
        made.append((losses, engine.optimiser_state(), engine.weights.parameters))
    (plain, states, weights), (found, offloaded, parameters) = made
    assert found == plain
    assert states.keys() == offloaded.keys()
    for name, moment in states.items():
        assert torch.equal(offloaded[name], moment), name
        assert bool(moment.any()), name
    for name, weight in weights.items():
        assert torch.equal(parameters[name], weight), name


def test_moments_in_main_memory_are_brought_for_one_tensor_and_sent_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU sees, of a device whose tensors are copies: as if the processor had two memories."""
    there: list[weakref.ref[Tensor]] = []
    most = 0

    def sent(moment: Tensor, device: torch.device, **_: Any) -> Tensor:
        nonlocal most
        copy = moment.clone()
        there.append(weakref.ref(copy))
        most = max(most, sum(one() is not None for one in there))
        return copy

    weights = [torch.nn.Parameter(torch.full((4, 4), float(number))) for number in range(3)]
    plain = [torch.nn.Parameter(one.detach().clone()) for one in weights]
    held = HeldAdamW([{"params": weights}], "OFFLOADED", BETAS, EPSILON, is_fused=True)
    torchs = torch.optim.AdamW(plain, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)
    monkeypatch.setattr(moments, "_sent", sent)
    for step in range(3):
        for one, other in zip(weights, plain, strict=True):
            one.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        for optimiser in (held, torchs):
            optimiser.param_groups[0]["lr"] = 0.1
            optimiser.step()
    assert len(there) == 18, "both moments of three tensors, three times"
    assert most == 2, "those of one tensor at a time"
    for one, other in zip(weights, plain, strict=True):
        assert torch.equal(one, other)
        for moment in MOMENTS:
            assert torch.equal(held.state[one][moment], torchs.state[other][moment])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moments_in_main_memory_change_no_bit_on_a_gpu(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    device, found = torch.device("cuda"), []
    for settings in (OPTIMISER, OFFLOADED):
        model: Any = tiny_llama(torch.bfloat16)
        engine = Engine(AllWeights(model.to(device)), settings, device)
        losses = trained(engine, batches)
        held = {one.device.type for one in engine.optimiser_state().values()}
        assert held == ({"cpu"} if settings.states == "OFFLOADED" else {"cuda"})
        found.append((losses, [one.cpu() for one in engine.optimiser_state().values()]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


@pytest.mark.parametrize("settings", [EIGHT, OFFLOADED], ids=["eight", "offloaded"])
def test_what_is_kept_goes_on_with_the_same_bits(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], tmp_path: Path, settings: OptimiserSettings
) -> None:
    def steps(engine: Engine, some: Sequence[Sequence[PackedBatch]], rates: Sequence[float]) -> None:
        for step, rate in zip(some, rates, strict=True):
            for batch in step:
                engine.accumulate(batch, FusedLoss(), supervised(learnt(step)))
            engine.update(rate)

    whole = engine_of(tiny_llama(torch.bfloat16), settings)
    steps(whole, batches, RATES)
    first = engine_of(tiny_llama(torch.bfloat16), settings)
    steps(first, batches[:2], RATES[:2])
    first.weights.save(tmp_path)
    kept = {name: one.clone() for name, one in first.optimiser_state().items()}
    second = engine_of(tiny_llama(torch.bfloat16), settings)
    second.weights.load(tmp_path)
    second.load_optimiser_state(kept, 2)
    steps(second, batches[2:], RATES[2:])
    for name, one in whole.optimiser_state().items():
        assert torch.equal(second.optimiser_state()[name], one), name
    for name, one in whole.weights.parameters.items():
        assert torch.equal(second.weights.parameters[name], one), name


def test_moments_of_another_kind_are_refused(tiny_llama: ModelMaker) -> None:
    plain, eight = engine_of(tiny_llama(), OPTIMISER), engine_of(tiny_llama())
    for one, other in ((plain, eight), (eight, plain)):
        with pytest.raises(DataLoss, match="must hold both moments of every trained tensor, and no other"):
            one.load_optimiser_state(other.optimiser_state(), 1)


def test_adapters_may_have_them_too(tiny_llama: ModelMaker, batches: list[list[PackedBatch]]) -> None:
    """Few of their factors are large enough; embeddings that they train are."""
    engine = adapter_engine(tiny_llama())
    assert not any(name.endswith(".codes") for name in engine.optimiser_state())


def test_plans_count_them() -> None:
    products = 10 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    eight = replace(ALL, num_in_8_bits=products)
    found = moments_bytes(ALL, "CPU") - moments_bytes(eight, "CPU")
    assert found == 8 * products - 2 * (products + 4 * products // 256)
    before, after = footprint.footprint(ALL, PASS, "NONE"), footprint.footprint(eight, PASS, "NONE")
    assert before.optimiser - after.optimiser == found
    assert before.peak - after.peak == found
    assert BLOCK == footprint._MOMENT_BLOCK


def test_plans_of_a_gpu_count_moments_of_one_tensor_where_the_others_are_in_main_memory() -> None:
    offloaded = replace(ALL, offloads_moments=True)
    largest = max(64 * 64, 64 * 128, ALL.shape.vocabulary * ALL.shape.hidden)
    assert moments_bytes(offloaded, "GPU") == 8 * largest
    assert moments_bytes(offloaded, "CPU") == moments_bytes(ALL, "CPU") == moments_bytes(ALL, "GPU")
    plain, less = (footprint.footprint(one, PASS, "NONE", "GPU") for one in (ALL, offloaded))
    assert plain.peak - less.peak == moments_bytes(ALL, "GPU") - 8 * largest
