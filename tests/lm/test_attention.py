from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from luthier.errors import InvalidArgument
from luthier.kernels.dispatch import available_isas, force_isa
from luthier.lm.attention import IMPLEMENTATION, attention, packed_forward
from luthier.lm.packed import pack

ModelMaker = Callable[..., Any]

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
SEQUENCES = [[5, 9, 11, 40, 3], [8], [17, 21, 4, 60, 61, 62, 7, 9], [90, 1, 33]]


def packed(sequences: Any) -> Any:
    return pack(sequences, {})


def hidden_of(model: Any, sequences: Any) -> Any:
    batch = packed(sequences)
    return packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_equals_each_sequence_alone_in_plain_transformers(
    tiny_model: ModelMaker, family: str
) -> None:
    hidden = hidden_of(tiny_model(family), SEQUENCES)
    plain = tiny_model(family, attention="eager")
    alone = [plain.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in SEQUENCES]
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_forward_leaks_nothing_between_sequences(tiny_model: ModelMaker, family: str) -> None:
    model = tiny_model(family)
    before = hidden_of(model, SEQUENCES)
    changed = [ids[:] for ids in SEQUENCES]
    changed[2] = [token + 1 for token in changed[2]]
    after = hidden_of(model, changed)
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[14:], after[14:])
    assert not torch.equal(before[6:14], after[6:14])


def test_packed_forward_gradient_equals_each_sequence_alone(tiny_model: ModelMaker) -> None:
    model, plain = tiny_model(), tiny_model(attention="eager")
    weight = model.base_model.layers[0].self_attn.k_proj.weight.requires_grad_()
    expected = plain.base_model.layers[0].self_attn.k_proj.weight.requires_grad_()
    hidden_of(model, SEQUENCES).square().sum().backward()
    for ids in SEQUENCES:
        plain.base_model(input_ids=torch.tensor([ids])).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_model_with_our_attention_still_obeys_padding_masks(tiny_model: ModelMaker) -> None:
    model, plain = tiny_model(), tiny_model(attention="eager")
    ids = torch.tensor([[0, 0, 5, 9, 11], [4, 8, 15, 16, 23]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ours = model(input_ids=ids, attention_mask=mask).logits
    theirs = plain(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [(0,), (0, 3), (1, 5), (0, 3, 3, 5), (0, 4, 3, 5)])
def test_packed_forward_refuses_boundaries_that_do_not_cover_the_batch(
    tiny_model: ModelMaker, bounds: tuple[int, ...]
) -> None:
    with pytest.raises(InvalidArgument, match="rise from 0 to 5"):
        packed_forward(tiny_model(), torch.arange(5), torch.arange(5), bounds)


def test_packed_forward_sees_no_further_than_the_sliding_window(tiny_model: ModelMaker) -> None:
    model, plain = (
        tiny_model("mistral", sliding_window=4, attention=name) for name in (IMPLEMENTATION, "eager")
    )
    got = hidden_of(model, SEQUENCES)
    want = torch.cat(
        [plain.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in SEQUENCES]
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        got, hidden_of(tiny_model("mistral", sliding_window=None), SEQUENCES), atol=1e-3
    )


class Layer(nn.Module):
    layer_idx = 0
    num_key_value_groups = 3
    is_causal = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_queries", [1, 7, 8, 33])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_beside_a_prefix_equals_the_plain_formula(
    num_queries: int, dtype: torch.dtype, softcap: float
) -> None:
    B, H, G, D, P, K = 3, 6, 2, 16, 11, 40
    torch.manual_seed(0)
    query = torch.randn(B, H, num_queries, D).to(dtype)
    key, value = torch.randn(2, B, G, K, D).to(dtype)
    prefix_key, prefix_value = torch.randn(2, 1, G, P, D).to(dtype)
    mask = torch.rand(B, 1, num_queries, K) < 0.7
    output, _ = attention(
        Layer(),
        query,
        key,
        value,
        mask,
        shared_prefix=[(prefix_key, prefix_value)],
        scaling=D**-0.5,
        softcap=softcap,
    )
    joined = [
        torch.cat([first.expand(B, -1, -1, -1), own], dim=2).double().repeat_interleave(H // G, dim=1)
        for first, own in ((prefix_key, key), (prefix_value, value))
    ]
    scores = query.double() @ joined[0].transpose(2, 3) * D**-0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    visible = torch.cat([torch.ones(B, 1, num_queries, P, dtype=torch.bool), mask], dim=3)
    wanted = scores.masked_fill(~visible, float("-inf")).softmax(dim=3) @ joined[1]
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(output.double(), wanted.transpose(1, 2), atol=tolerance)


def test_bfloat16_products_of_few_queries_are_summed_in_float32_on_avx2() -> None:
    if "avx2" not in available_isas():
        pytest.skip("needs AVX2")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 64) for heads, length in ((6, 1), (2, 300), (2, 300)))
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    force_isa("avx2")
    try:
        output, _ = attention(
            Layer(), query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, scaling=0.125
        )
    finally:
        force_isa(None)
    query, key, value = (part.bfloat16().float() for part in (query, key, value))
    wanted, _ = attention(Layer(), query, key, value, mask, scaling=0.125)
    assert torch.equal(output, wanted.bfloat16())
