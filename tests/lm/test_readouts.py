from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.errors import InvalidArgument
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.readouts import FusedLoss, SequenceValues, TokenLogprobs, read

ModelMaker = Callable[..., Any]

SEQUENCES = [
    ([5, 9, 11, 40, 3], [False, False, True, True, True]),
    ([8, 77], [False, True]),
    ([17, 21, 4, 60, 61, 62, 7, 9], [True, False, False, True, False, False, True, True]),
]


def packed(sequences: Sequence[tuple[list[int], Sequence[float]]]) -> PackedBatch:
    return pack([ids for ids, _ in sequences], {WEIGHT: [flags for _, flags in sequences]})


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
def test_fused_loss_and_gradients_equal_transformers_with_padding(
    tiny_model: ModelMaker, family: str
) -> None:
    ours, theirs = (with_adapter(tiny_model(family, attention=kind)) for kind in ("luthier_packed", "eager"))
    with use_adapter(ours, "default"), use_adapter(theirs, "default"):
        loss_sum, count = read(ours, packed(SEQUENCES), FusedLoss())
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
        loss_sum, count = read(whole, packed(SEQUENCES), FusedLoss())
        (loss_sum / count).backward()  # type: ignore[no-untyped-call]
        for sequence in SEQUENCES:
            (read(cut, packed([sequence]), FusedLoss())[0] / count).backward()  # type: ignore[no-untyped-call]
    wanted = adapter_parameters(whole, "default")
    for key, parameter in adapter_parameters(cut, "default").items():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-4, atol=1e-5)


def test_fused_loss_refuses_a_batch_that_teaches_nothing(tiny_model: ModelMaker) -> None:
    with pytest.raises(InvalidArgument, match="got none in 2 sequences") as caught:
        read(tiny_model(), packed([([5, 6], [True, False]), ([7], [True])]), FusedLoss())
    assert caught.value.reason == "NO_SUPERVISED_TOKENS"


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {key: parameter.grad for key, parameter in adapter_parameters(model, "default").items()}
    assert all(gradient is not None for gradient in found.values())
    return {key: gradient for key, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("impl", ["eager", "cpu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_log_probabilities_give_the_loss_and_gradients_of_the_fused_loss(
    tiny_model: ModelMaker, dtype: torch.dtype, tolerance: float, impl: Any
) -> None:
    """Also with weights that are not 0 and 1: within 1e-5 of the largest gradient, in bfloat16 within 2e-2."""
    weighted = [(ids, [0.5 * flag for flag in flags]) for ids, flags in SEQUENCES]
    for sequences in (SEQUENCES, weighted):
        fused, general = (with_adapter(tiny_model().to(dtype)) for _ in range(2))
        batch = packed(sequences)
        with use_adapter(fused, "default"), use_adapter(general, "default"):
            loss_sum, count = read(fused, batch, FusedLoss(impl=impl))
            scores = read(general, batch, TokenLogprobs(impl=impl))
        weight = batch.streams[WEIGHT][scores.position + 1]
        total = -(scores.logprob * weight).sum()
        assert scores.logprob.numel() == count == 7
        assert total.item() == pytest.approx(loss_sum.item(), rel=1e-5)
        loss_sum.backward()  # type: ignore[no-untyped-call]
        total.backward()  # type: ignore[no-untyped-call]
        wanted = gradients(fused)
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        assert largest > 0
        for key, gradient in gradients(general).items():
            torch.testing.assert_close(gradient, wanted[key], rtol=0, atol=tolerance * largest)


def test_log_probabilities_and_entropies_are_those_of_the_logits(tiny_model: ModelMaker) -> None:
    model = with_adapter(tiny_model())
    batch = packed(SEQUENCES)
    other = {**batch.streams, "advantage": torch.zeros(15).index_fill(0, torch.tensor([1]), 0.25)}
    with use_adapter(model, "default"), torch.no_grad():
        readout = TokenLogprobs(streams=(WEIGHT, "advantage"), want_entropy=True)
        scores = read(model, replace(batch, streams=other), readout)
        logits = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=1) for ids, _ in SEQUENCES]
    assert scores.position.tolist() == [0, 1, 2, 3, 5, 9, 12, 13]
    rows = torch.cat(logits)[scores.position]
    torch.testing.assert_close(
        scores.logprob, rows.gather(1, batch.input_ids[scores.position + 1, None])[:, 0]
    )
    torch.testing.assert_close(scores.entropy, -(rows.exp() * rows).sum(dim=1), rtol=1e-4, atol=1e-5)


def test_sequence_values_are_read_at_the_last_tokens_and_train_their_head(tiny_model: ModelMaker) -> None:
    model = with_adapter(tiny_model())
    head = torch.linspace(-1, 1, 32).requires_grad_()
    with use_adapter(model, "default"):
        values = read(model, packed(SEQUENCES), SequenceValues(head=head))
        hidden = [model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids, _ in SEQUENCES]
    torch.testing.assert_close(values, torch.stack(hidden) @ head, rtol=1e-4, atol=1e-5)
    values.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(head.grad, torch.stack(hidden).sum(dim=0).detach(), rtol=1e-4, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in gradients(model).values())
