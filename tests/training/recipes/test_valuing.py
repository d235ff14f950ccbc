"""Values of sequences: those of transformers' classifier, however they are packed, and each sequence once."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.training.recipes.test_reward_model import Run
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.lm.adapter_files import load_reward_adapter
from luthier.lm.load import load_reward_model
from luthier.lm.lora import LoraSpec, insert_lora, use_adapter
from luthier.lm.packed import pack
from luthier.training.recipes.valuing import Valuer
from luthier.training.recipes.weights import MASTERS_NAME, Adapter

ModelMaker = Callable[..., PreTrainedModel]


def sequences(count: int) -> list[tuple[int, ...]]:
    """Of 2 to 20 tokens; 0 is what pads them for transformers."""
    draw = random.Random(3)
    return [tuple(draw.randrange(3, 90) for _ in range(draw.randint(2, 20))) for _ in range(count)]


def classified(classifier: Any, texts: list[tuple[int, ...]]) -> list[float]:
    with torch.no_grad():
        return [classifier(input_ids=torch.tensor([text])).logits.item() for text in texts]


def trained(tiny_llama: ModelMaker, kind: str, folder: Path) -> Path:
    run = Run(tiny_llama(), kind, num_epochs=2)
    run.finish(run.events(), folder / "checkpoints")
    run.engine.weights.save(folder / kind)
    (folder / kind / MASTERS_NAME).unlink(missing_ok=True)
    return folder / kind


# peft 0.21 reads it when it wraps a model of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# The base has no head for values; PEFT brings it.
@pytest.mark.filterwarnings("ignore:Some weights of")
def test_an_adapter_beside_the_one_that_trains_has_the_values_of_peft(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    folder = trained(tiny_llama, "adapter", tmp_path)
    tiny_llama(attention="eager").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    theirs = classified(PeftModel.from_pretrained(base, folder).eval(), sequences(9))

    model = tiny_llama()
    _, head = load_reward_adapter(model, folder, "judge")
    insert_lora(model, LoraSpec(rank=2, alpha=4.0, targets=("q_proj",)), seed=1, name="policy")
    policy = Adapter(model, "policy", base_model="tiny")
    with torch.no_grad():
        policy.parameters["model.layers.0.self_attn.q_proj.lora_B"].fill_(0.5)
    ids = torch.tensor([sequences(1)[0]])
    with torch.no_grad():
        before = model(ids).logits
    ours = Valuer(model=model, head=head, adapter="judge").values(sequences(9), 64)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert max(ours) - min(ours) > 0.1
    with torch.no_grad(), use_adapter(model, None):
        plain = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "the policy is active as before"
    assert not torch.equal(plain, before)
    assert not any(
        parameter.grad.any() for parameter in policy.parameters.values() if parameter.grad is not None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_have_the_values_of_transformers(
    tiny_llama: ModelMaker, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = trained(tiny_llama, "all", tmp_path)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    found = load_reward_model(folder, dtype)
    ours = Valuer(model=found.model, head=found.score).values(sequences(9), 64)
    # In bfloat16 values of about 2 are apart by 1/64, and theirs have a rounded head.
    rel, absolute = (1e-4, 1e-5) if dtype == torch.float32 else (3e-2, 1e-1)
    assert ours == pytest.approx(classified(classifier.eval(), sequences(9)), rel=rel, abs=absolute)


@pytest.fixture
def valuer(tiny_llama: ModelMaker) -> Valuer:
    generator = torch.Generator().manual_seed(1)
    return Valuer(model=tiny_llama(), head=torch.randn(1, 32, generator=generator))


def test_values_do_not_depend_on_the_cut_beyond_rounding(valuer: Valuer) -> None:
    whole = valuer.values(sequences(12), 1000)
    for limit in (1, 20, 33):  # a longer one has a pass of its own size
        assert valuer.values(sequences(12), limit) == pytest.approx(whole, rel=1e-4, abs=1e-5)
    assert valuer.values(sequences(12), 33) == valuer.values(sequences(12), 33)
    assert valuer.values([], 33) == []


def test_equal_sequences_go_through_the_model_once_and_have_one_value(
    valuer: Valuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def remembering(chosen: list[tuple[int, ...]], *rest: Any) -> Any:
        seen.extend(chosen)
        return pack(chosen, *rest)

    monkeypatch.setattr("luthier.training.recipes.valuing.pack", remembering)
    checks: list[int] = []
    few = sequences(5)
    found = valuer.values([*few, few[2], *few, few[0]], 24, lambda: checks.append(1))
    assert sorted(seen) == sorted(few)
    assert found[:5] == found[6:11]
    assert (found[5], found[11]) == (found[2], found[0])
    assert len(checks) > 1


def test_a_broken_head_gives_what_is_no_number(valuer: Valuer) -> None:
    broken = Valuer(model=valuer.model, head=torch.full((1, 32), math.nan))
    assert all(map(math.isnan, broken.values(sequences(2), 64)))
