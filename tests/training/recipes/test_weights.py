"""All weights of a model: trained as a plain loop would, resumed to the bit, and loaded by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.recipes.test_engine import (
    CPU,
    OPTIMISER,
    assert_close,
    batch_of,
    learnt,
    plain_training,
    trained,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.errors import DataLoss
from luthier.lm.load import load_model
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import MASTERS_NAME, MODEL_NAME, Adapter, AllWeights

ModelMaker = Callable[..., PreTrainedModel]
RUN = checkpoint.RunIdentity(plan_digest="d", settings={}, optimiser=OPTIMISER, surroundings={})


@pytest.fixture
def batches(token_rows: Callable[..., list[Any]]) -> list[list[PackedBatch]]:
    rows = token_rows(30)
    return [[batch_of(rows[at : at + 3]) for at in (start, start + 3)] for start in range(0, 30, 6)]


@pytest.fixture
def make_engine(tiny_llama: ModelMaker, tmp_path: Path) -> Callable[[torch.dtype], Engine]:
    """Makes an engine on all weights of a model as a worker loads it."""
    tiny_llama().save_pretrained(tmp_path / "base")

    def make(dtype: torch.dtype) -> Engine:
        return Engine(AllWeights(load_model(tmp_path / "base", dtype)), OPTIMISER, CPU)

    return make


EngineMaker = Callable[[torch.dtype], Engine]


@pytest.mark.parametrize("tied", [True, False])
def test_steps_on_all_weights_equal_a_plain_loop(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], *, tied: bool
) -> None:
    """Embeddings that are the head too have one name, and the gradients of both uses."""
    model, plain = tiny_llama(), tiny_llama(attention="eager")
    if not tied:
        for one in (model, plain):
            untie(one)
    engine = Engine(AllWeights(model), OPTIMISER, CPU)
    assert ("lm_head.weight" in engine.weights.parameters) is not tied
    plain.requires_grad_(requires_grad=True)
    wanted = plain_training(plain, list(plain.parameters()), batches)
    assert trained(engine, batches) == pytest.approx(wanted, rel=1e-4)
    assert_close(engine.weights.parameters, dict(plain.named_parameters()))


def test_matrices_decay_and_norms_do_not(tiny_llama: ModelMaker) -> None:
    engine = Engine(AllWeights(tiny_llama()), OptimiserSettings(weight_decay=0.5, max_grad_norm=0), CPU)
    before = {name: parameter.detach().clone() for name, parameter in engine.weights.parameters.items()}
    engine.update(0.1)  # all gradients are zero
    norms = [name for name in before if name.endswith("norm.weight")]
    assert len(norms) > 2
    for name, parameter in engine.weights.parameters.items():
        assert torch.equal(parameter, before[name] * (1.0 if name in norms else 0.95)), name


def untie(model: Any) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_on_all_weights_ends_with_the_same_bits(
    make_engine: EngineMaker, batches: list[list[PackedBatch]], tmp_path: Path, dtype: torch.dtype
) -> None:
    whole, first, second = (make_engine(dtype) for _ in range(3))
    losses = trained(whole, batches)
    for step, rate in zip(batches[:2], (2e-3, 5e-3), strict=True):
        for batch in step:
            first.accumulate(batch, FusedLoss(), supervised(learnt(step)))
        first.update(rate)
    checkpoint.save(tmp_path / "stopped", first, Course(step=2), RUN)
    course, changed = checkpoint.load(tmp_path / "stopped", second, RUN)
    assert (course.step, changed) == (2, [])
    rest = []
    for step, rate in zip(batches[2:], (5e-3, 4e-3, 1e-3), strict=True):
        sums = [second.accumulate(batch, FusedLoss(), supervised(learnt(step))) for batch in step]
        rest.append(sum(one["train_loss"] for one in sums) / learnt(step))
        second.update(rate)
    assert rest == losses[2:]
    for engine, folder in ((whole, "whole"), (second, "resumed")):
        checkpoint.save(tmp_path / folder, engine, Course(step=5), RUN)
    assert (tmp_path / "whole" / MASTERS_NAME).exists() is (dtype == torch.bfloat16)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_weights_load_in_transformers_and_here_with_the_same_loss(
    make_engine: EngineMaker, batches: list[list[PackedBatch]], tmp_path: Path, dtype: torch.dtype
) -> None:
    engine = make_engine(dtype)
    losses = trained(engine, batches)
    assert losses[-1] < losses[0]
    folder = tmp_path / "saved"
    engine.weights.save(folder)
    (folder / MASTERS_NAME).unlink(missing_ok=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    trained_model: Any = engine.weights.model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, weight in loaded.named_parameters():
        assert weight.dtype == dtype
        assert torch.equal(weight, trained_model.get_parameter(name)), name
    here = Engine(AllWeights(load_model(folder, dtype)), OPTIMISER, CPU)
    batch = batches[0][0]
    assert here.score(batch, FusedLoss()) == engine.score(batch, FusedLoss())


def test_gradients_of_rounded_weights_are_summed_in_float32(
    make_engine: EngineMaker, batches: list[list[PackedBatch]]
) -> None:
    together = make_engine(torch.bfloat16)
    passes = []
    for batch in batches[0] + batches[1]:
        alone = make_engine(torch.bfloat16)
        for engine in (alone, together):
            engine.accumulate(batch, FusedLoss(), supervised(50))
        passes.append({name: one.grad for name, one in alone.weights.parameters.items()})
    is_rounded = True
    for name, parameter in together.weights.parameters.items():
        assert parameter.grad is not None
        total = torch.zeros_like(parameter)
        for found in passes:
            gradient = found[name]
            assert gradient is not None
            total += gradient
        assert torch.equal(parameter.grad, total), name
        is_rounded = is_rounded and torch.equal(total, total.bfloat16().float())
    assert not is_rounded, "some sum has bits that bfloat16 has no room for"


def test_a_small_update_changes_the_master_where_it_would_not_change_the_weight(
    make_engine: EngineMaker, batches: list[list[PackedBatch]]
) -> None:
    engine = make_engine(torch.bfloat16)
    before = {name: one.detach().clone() for name, one in engine.weights.parameters.items()}
    engine.accumulate(batches[0][0], FusedLoss(), supervised(10))
    engine.update(1e-7)
    name = "model.layers.0.mlp.up_proj.weight"
    after = engine.weights.parameters[name].detach()
    assert not torch.equal(after, before[name])
    assert torch.equal(after.bfloat16(), engine.weights.model.get_parameter(name))


def test_load_refuses_files_of_other_weights(
    make_engine: EngineMaker, tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    engine = make_engine(torch.bfloat16)
    engine.weights.save(tmp_path / "saved")
    masters = tmp_path / "saved" / MASTERS_NAME
    (tmp_path / "saved" / MODEL_NAME).rename(masters)
    with pytest.raises(DataLoss, match=r"masters\.safetensors must hold the tensors of this run's weights"):
        engine.weights.load(tmp_path / "saved")
    masters.write_bytes(b"nonsense")
    with pytest.raises(DataLoss, match=r"masters\.safetensors cannot be read"):
        engine.weights.load(tmp_path / "saved")
    masters.unlink()
    with pytest.raises(DataLoss, match=r"masters\.safetensors cannot be read"):
        engine.weights.load(tmp_path / "saved")


def test_the_result_of_all_weights_is_what_others_load(make_engine: EngineMaker, tmp_path: Path) -> None:
    engine = make_engine(torch.bfloat16)
    written = engine.weights.save(tmp_path / "saved")
    assert set((tmp_path / "saved").iterdir()) == set(written)
    assert all(engine.weights.needs(path.name) for path in written)
    assert engine.weights.result_files == ("config.json", "model.safetensors")
    stored = load_file(tmp_path / "saved" / MODEL_NAME)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored
    assert Adapter.result_files == ("adapter_config.json", "adapter_model.safetensors")
