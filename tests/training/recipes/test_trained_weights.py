"""Weights trained whole beside an adapter: as a plain loop would, resumed to the bit, compared with the base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.training.recipes.test_engine import (
    CPU,
    OPTIMISER,
    assert_close,
    batch_of,
    learnt,
    plain_adapter,
    plain_training,
    trained,
)
from tests.training.recipes.test_weights import untie
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.lm.adapter_files import load_adapter, load_reward_adapter
from luthier.lm.attention import packed_forward
from luthier.lm.lora import LoraSpec, insert_lora, use_adapter
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.readouts import FusedLoss, SequenceValues, TokenLogprobs, read
from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import SCORE, Adapter, fresh_score

ModelMaker = Callable[..., PreTrainedModel]
RUN = checkpoint.RunIdentity(plan_digest="d", settings={}, optimiser=OPTIMISER, surroundings={})
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
IDS = torch.tensor([[5, 9, 11, 40, 3, 17]])
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def batches(token_rows: Callable[..., list[Any]]) -> list[list[PackedBatch]]:
    rows = token_rows(30)
    return [[batch_of(rows[at : at + 3]) for at in (start, start + 3)] for start in range(0, 30, 6)]


def engine_of(
    model: PreTrainedModel, modules: Sequence[str] = ("embed_tokens",), dropout: float = 0.0, **settings: Any
) -> Engine:
    spec = LoraSpec(rank=4, alpha=8.0, trained_modules=tuple(modules), dropout=dropout)
    insert_lora(model, spec, seed=11)
    return Engine(Adapter(model, "default", base_model="tiny", **settings), OPTIMISER, CPU)


def step(engine: Engine, batches: Sequence[PackedBatch], rate: float) -> float:
    sums = [engine.accumulate(batch, FusedLoss(), supervised(learnt(batches))) for batch in batches]
    engine.update(rate)
    return sum(one["train_loss"] for one in sums) / learnt(batches)


@pytest.mark.parametrize(
    ("tied", "modules"),
    [(True, ["embed_tokens"]), (False, ["embed_tokens"]), (False, ["embed_tokens", "lm_head"])],
)
def test_steps_equal_a_plain_loop(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], modules: list[str], *, tied: bool
) -> None:
    """A tied weight has one gradient, of both uses."""
    model, plain = tiny_llama(), tiny_llama(attention="eager")
    if not tied:
        for one in (model, plain):
            untie(one)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model, modules)
    weights = engine.weights
    assert isinstance(weights, Adapter)
    names = {EMBEDDING, HEAD} if len(modules) == 2 else {EMBEDDING}
    assert {name for name in weights.parameters if "lora" not in name} == names
    parameters = plain_adapter(plain, weights)
    wanted = plain_training(plain, list(parameters.values()), batches)
    assert trained(engine, batches) == pytest.approx(wanted, rel=1e-4)
    assert_close(weights.parameters, parameters)
    with use_adapter(model, None):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items()), "the base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(
    tiny_llama: ModelMaker,
    batches: list[list[PackedBatch]],
    tmp_path: Path,
    dtype: torch.dtype,
    *,
    tied: bool,
) -> None:
    def make() -> Engine:
        model = tiny_llama(dtype)
        if not tied:
            untie(model)
        return engine_of(model, ("embed_tokens",) if tied else ("embed_tokens", "lm_head"), dropout=0.2)

    whole, first, second = (make() for _ in range(3))
    losses = trained(whole, batches)
    for part, rate in zip(batches[:2], (2e-3, 5e-3), strict=True):
        step(first, part, rate)
    checkpoint.save(tmp_path / "stopped", first, Course(step=2), RUN)
    course, changed = checkpoint.load(tmp_path / "stopped", second, RUN)
    assert (course.step, changed) == (2, [])
    rest = [step(second, part, rate) for part, rate in zip(batches[2:], (5e-3, 4e-3, 1e-3), strict=True)]
    assert rest == losses[2:]
    for engine, folder in ((whole, "whole"), (second, "resumed")):
        checkpoint.save(tmp_path / folder, engine, Course(step=5), RUN)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name
    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    kept = [tensor for key, tensor in saved.items() if "lora" not in key]
    assert [tensor.dtype for tensor in kept] == [torch.float32] * 2
    rounded = [torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept]
    assert not any(rounded), "masters, with what bfloat16 has no room for"
    assert torch.equal(*kept) is tied


def test_what_a_bfloat16_run_computes_with_is_what_others_load_of_it(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], tmp_path: Path
) -> None:
    engine = engine_of(tiny_llama(torch.bfloat16))
    trained(engine, batches)
    engine.weights.save(tmp_path)
    loaded = tiny_llama(torch.bfloat16)
    load_adapter(loaded, tmp_path, "tuned")
    batch = batches[0][0]
    with use_adapter(loaded, "tuned"), torch.no_grad():
        found = read(loaded, batch, TokenLogprobs()).logprob
    assert torch.equal(found, engine.score(batch, TokenLogprobs()).logprob)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path).eval()
    ours = loaded
    with use_adapter(ours, "tuned"), torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0.05, atol=0.05)


def test_the_reference_is_the_base_or_the_adapter_that_it_began_as(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], tmp_path: Path
) -> None:
    batch = batches[0][0]
    with torch.no_grad():
        base = read(tiny_llama(torch.bfloat16), batch, TokenLogprobs()).logprob
    first = engine_of(tiny_llama(torch.bfloat16))
    trained(first, batches)
    reference = first.weights.reference()
    assert reference is not None
    with reference:
        torch.testing.assert_close(first.score(batch, TokenLogprobs()).logprob, base, rtol=0.02, atol=0.02)
    tuned = first.score(batch, TokenLogprobs()).logprob
    assert not torch.allclose(tuned, base, atol=0.05)
    first.weights.save(tmp_path)

    model = tiny_llama(torch.bfloat16)
    spec = LoraSpec(rank=4, alpha=8.0, trained_modules=("embed_tokens",))
    insert_lora(model, spec, seed=11)
    load_adapter(model, tmp_path, "reference")
    weights = Adapter(model, "default", base_model="tiny", reference="reference")
    weights.begin_from(tmp_path)
    second = Engine(weights, OPTIMISER, CPU)
    assert torch.equal(second.score(batch, TokenLogprobs()).logprob, tuned)
    trained(second, batches)
    with weights.reference():
        assert torch.equal(second.score(batch, TokenLogprobs()).logprob, tuned)
    assert not torch.equal(second.score(batch, TokenLogprobs()).logprob, tuned)


def test_a_reward_model_with_an_embedding_of_its_own_loads_in_transformers_and_here(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], tmp_path: Path
) -> None:
    model = tiny_llama()
    score = fresh_score(model, seed=5)
    engine = engine_of(model, score=score)
    trained(engine, batches)
    engine.weights.save(tmp_path / "reward")
    tiny_llama().save_pretrained(tmp_path / "base")
    base: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs: Any = peft.PeftModel.from_pretrained(base, tmp_path / "reward").eval()
    assert sorted(
        key for key in load_file(tmp_path / "reward" / "adapter_model.safetensors") if "lora" not in key
    ) == [
        f"base_model.model.{EMBEDDING}",
        f"base_model.model.{SCORE}",
    ]
    batch = pack([IDS[0].tolist()], {WEIGHT: [[1] * 6]})
    value = engine.score(batch, SequenceValues(head=engine.weights.parameters[SCORE]))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits[:, 0], value, rtol=1e-4, atol=1e-5)
    loaded = tiny_llama()
    _, head = load_reward_adapter(loaded, tmp_path / "reward", "judge")
    with use_adapter(loaded, "judge"), torch.no_grad():
        hidden_TE = packed_forward(loaded, batch.input_ids, batch.position_ids, batch.cu_seqlens)
        torch.testing.assert_close(SequenceValues(head=head)(loaded, hidden_TE, batch), value)


def test_another_run_goes_on_with_the_masters_and_its_own_head(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    first = engine_of(tiny_llama(torch.bfloat16))
    for parameter in first.weights.parameters.values():
        parameter.data.mul_(1.0001)
    first.weights.publish()
    first.weights.save(tmp_path)
    model = tiny_llama(torch.bfloat16)
    score = fresh_score(model, seed=5)
    insert_lora(model, LoraSpec(rank=4, alpha=8.0, trained_modules=("embed_tokens",)), seed=12)
    weights = Adapter(model, "default", base_model="tiny", score=score)
    before = score.detach().clone()
    weights.begin_from(tmp_path)
    for name, parameter in first.weights.parameters.items():
        assert torch.equal(weights.parameters[name], parameter), name
    assert torch.equal(weights.parameters[SCORE], before)
