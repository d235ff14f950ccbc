from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.errors import InvalidArgument
from luthier.lm.attention import IMPLEMENTATION, head_weight, packed_forward
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


def test_head_weight_is_the_embedding_where_tied(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    assert head_weight(model) is model.base_model.embed_tokens.weight
    assert head_weight(tiny_model(tie_word_embeddings=False)).shape == (97, 32)
