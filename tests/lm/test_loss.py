from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.errors import InvalidArgument
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter
from luthier.lm.loss import supervised_loss
from luthier.lm.packed import pack

ModelMaker = Callable[..., Any]

SEQUENCES = [
    ([5, 9, 11, 40, 3], [False, False, True, True, True]),
    ([8, 77], [False, True]),
    ([17, 21, 4, 60, 61, 62, 7, 9], [True, False, False, True, False, False, True, True]),
]


def with_adapter(model: Any) -> Any:
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(model, "default").values():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


def padded_loss(model: Any) -> Any:
    """transformers' own loss of the same records, padded on the right, labels -100 where unsupervised."""
    width = max(len(ids) for ids, _ in SEQUENCES)
    ids = torch.zeros(len(SEQUENCES), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, flags) in enumerate(SEQUENCES):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        wanted = [token if flag else -100 for token, flag in zip(tokens, flags, strict=True)]
        labels[row, : len(tokens)] = torch.tensor(wanted)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_supervised_loss_and_gradients_equal_transformers_with_padding(
    tiny_model: ModelMaker, family: str
) -> None:
    ours, theirs = (with_adapter(tiny_model(family, attention=kind)) for kind in ("luthier_packed", "eager"))
    with use_adapter(ours, "default"), use_adapter(theirs, "default"):
        loss_sum, count = supervised_loss(ours, pack(SEQUENCES))
        expected = padded_loss(theirs)
    assert count == 7  # the first token of the third record is supervised, and has nothing before it
    torch.testing.assert_close(loss_sum / count, expected, rtol=1e-5, atol=1e-6)
    (loss_sum / count).backward()  # type: ignore[no-untyped-call]
    expected.backward()
    wanted = adapter_parameters(theirs, "default")
    for key, parameter in adapter_parameters(ours, "default").items():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-5)


def test_gradient_does_not_depend_on_how_a_step_is_cut(tiny_model: ModelMaker) -> None:
    whole, cut = with_adapter(tiny_model()), with_adapter(tiny_model())
    with use_adapter(whole, "default"), use_adapter(cut, "default"):
        loss_sum, count = supervised_loss(whole, pack(SEQUENCES))
        (loss_sum / count).backward()  # type: ignore[no-untyped-call]
        for sequence in SEQUENCES:
            (supervised_loss(cut, pack([sequence]))[0] / count).backward()  # type: ignore[no-untyped-call]
    wanted = adapter_parameters(whole, "default")
    for key, parameter in adapter_parameters(cut, "default").items():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-5)


def test_supervised_loss_refuses_a_batch_that_teaches_nothing(tiny_model: ModelMaker) -> None:
    with pytest.raises(InvalidArgument, match="got none in 2 sequences") as caught:
        supervised_loss(tiny_model(), pack([([5, 6], [True, False]), ([7], [True])]))
    assert caught.value.reason == "NO_SUPERVISED_TOKENS"
