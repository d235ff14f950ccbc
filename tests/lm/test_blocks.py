"""Every architecture on our modules computes what transformers and PEFT compute: logits, loss and adapter gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from luthier.kernels.tables import force_impl
from luthier.lm.adapter_files import save_adapter
from luthier.lm.attention import IMPLEMENTATION, packed_forward
from luthier.lm.blocks import Attention, GatedMlp, Linear, RmsNorm, final_softcap, use_kernels
from luthier.lm.head import head_weight
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter
from luthier.lm.model_config import ARCHITECTURES
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import FusedLoss, read

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CONFIGS = {
    "GemmaForCausalLM": GemmaConfig(**(SHAPE | {"hidden_activation": "gelu_pytorch_tanh"})),
    "Gemma2ForCausalLM": Gemma2Config(
        **SHAPE,
        sliding_window=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    ),
    "LlamaForCausalLM": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": MistralConfig(**SHAPE, sliding_window=5),
    "Phi3ForCausalLM": Phi3Config(**(SHAPE | {"partial_rotary_factor": 0.5})),
    "Qwen2ForCausalLM": Qwen2Config(**{key: value for key, value in SHAPE.items() if key != "head_dim"}),
    "Qwen3ForCausalLM": Qwen3Config(**SHAPE),
    "SmolLM3ForCausalLM": SmolLM3Config(**SHAPE, no_rope_layers=[1, 0]),
}
SEQUENCES = [[5, 9, 11, 40, 3, 7, 8, 22], [8, 1], [17, 21, 4, 60, 61, 62, 7, 9, 33, 34, 35]]
LEARNT = [[False] * 3 + [True] * 5, [False, True], [False] * 6 + [True] * 5]


@pytest.fixture(params=["cpu", "eager"])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    force_impl(request.param)
    yield request.param
    force_impl("auto")


def plain_model(architecture: str) -> PreTrainedModel:
    config = AutoConfig.for_model(**CONFIGS[architecture].to_dict())
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norms that add one to their weight have weights about zero.
                low = -0.3 if "Gemma" in architecture else 0.5
                nn.init.uniform_(parameter, low, low + 1.0)
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    insert_lora(model, LoraSpec(rank=3, alpha=6.0), seed=1)
    for parameter in adapter_parameters(model, "default").values():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def test_configs_cover_every_architecture() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
@pytest.mark.usefixtures("impl")
def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(
    architecture: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    plain_model(architecture).save_pretrained(tmp_path / "base")
    ours = adapted(load_model(tmp_path / "base", dtype=torch.float32))
    save_adapter(ours, "default", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain_model(architecture), tmp_path / "adapter", is_trainable=True)
    batch = pack(SEQUENCES, {WEIGHT: LEARNT})
    with use_adapter(ours, "default"):
        hidden = packed_forward(ours, batch.input_ids, batch.position_ids, batch.cu_seqlens)
        loss, count = read(ours, batch, FusedLoss())
        loss.backward()  # type: ignore[no-untyped-call]
    cap = final_softcap(ours)
    logits = (hidden @ head_weight(ours).T).detach()
    start, want = 0, torch.zeros(())
    for ids, learnt in zip(SEQUENCES, LEARNT, strict=True):
        scores = theirs(input_ids=torch.tensor([ids])).logits[0]
        mine = logits[start : start + len(ids)]
        torch.testing.assert_close(
            torch.tanh(mine / cap) * cap if cap else mine, scores, rtol=2e-4, atol=2e-4
        )
        targets = torch.tensor([token if flag else -100 for token, flag in zip(ids, learnt, strict=True)])[1:]
        want = want + nn.functional.cross_entropy(scores[:-1], targets, reduction="sum")
        start += len(ids)
    want.backward()  # type: ignore[no-untyped-call]
    assert count == sum(map(sum, LEARNT))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    gradients = {
        name.replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    for name, parameter in adapter_parameters(ours, "default").items():
        other = gradients[f"base_model.model.{name}"]
        assert parameter.grad is not None
        assert other is not None
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_steps_are_those_of_transformers(architecture: str) -> None:
    plain = plain_model(architecture)
    ours = plain_model(architecture)
    ours.set_attn_implementation(IMPLEMENTATION)
    use_kernels(ours)
    ids = torch.tensor([[5, 9, 11, 40, 3], [8, 1, 17, 21, 4]])
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_use_kernels_replaces_every_block_and_keeps_every_name(architecture: str) -> None:
    model = plain_model(architecture)
    names = {name: parameter.data_ptr() for name, parameter in model.state_dict().items()}
    counts = use_kernels(model)
    assert counts["attention"] == counts["mlp"] == 2
    assert counts["norm"] >= 5
    assert {name: parameter.data_ptr() for name, parameter in model.state_dict().items()} == names
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(Attention) == kinds.count(GatedMlp) == 2
    assert kinds.count(RmsNorm) == counts["norm"]
    assert kinds.count(Linear) == counts["linear"]
    assert nn.Linear not in kinds
    assert use_kernels(model) == {"attention": 0, "linear": 0, "mlp": 0, "norm": 0}
