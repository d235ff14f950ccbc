from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from luthier.errors import AlreadyExists, InvalidArgument, NotFound, Reason
from luthier.lm.attention import packed_forward
from luthier.lm.lora import (
    LoraSpec,
    activate,
    adapter_parameters,
    dropping,
    insert_lora,
    muted,
    remove_adapter,
    target_modules,
    use_adapter,
)
from luthier.lm.lora_layer import AdapterSwitch, Factors, LoraLinear
from luthier.lm.packed import pack

ModelMaker = Callable[..., Any]

IDS = torch.tensor([[5, 9, 11, 40, 3, 17]])
SPEC = LoraSpec(rank=4, alpha=8)


def fill_b(model: Any, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapter_parameters(model, name).items():
        if key.endswith("lora_B"):
            parameter.data.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muted_is_the_base_with_the_bits_of_an_update_of_zero(
    tiny_model: ModelMaker, dtype: torch.dtype
) -> None:
    model = tiny_model().to(dtype)
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=1)
    ids, positions = torch.arange(3, 20), torch.arange(17)

    def hidden() -> torch.Tensor:
        with torch.no_grad():
            return packed_forward(model, ids, positions, (0, 17))

    base = hidden()
    with use_adapter(model, "default"):
        zero = hidden()  # of a fresh adapter
        for parameter in adapter_parameters(model, "default").values():
            parameter.data.normal_(generator=torch.Generator().manual_seed(5))
        with muted(model):
            silent = hidden()
        loud = hidden()
    assert torch.equal(silent, zero)
    assert not torch.allclose(loud, base, rtol=0.1)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(silent, base, rtol=tolerance, atol=tolerance)
    assert torch.equal(hidden(), base)


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_lora_spec_refuses_ranks_outside_its_range(rank: int) -> None:
    with pytest.raises(InvalidArgument, match=f"rank must be in 1..512, got {rank}"):
        LoraSpec(rank=rank, alpha=8)


@pytest.mark.parametrize("alpha", [0, -2.0, float("nan"), float("inf")])
def test_lora_spec_refuses_an_alpha_that_is_not_positive(alpha: float) -> None:
    with pytest.raises(InvalidArgument, match="alpha must be a positive finite number"):
        LoraSpec(rank=4, alpha=alpha)


def test_lora_spec_scales_by_rank_or_its_root() -> None:
    assert LoraSpec(rank=16, alpha=32).strengths(["q"]) == {"q": (16, 2.0)}
    assert LoraSpec(rank=16, alpha=32, use_rslora=True).strengths(["q"]) == {"q": (16, 8.0)}


def test_insert_lora_leaves_the_function_unchanged_and_the_weights_shared(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = model(IDS).logits
    insert_lora(model, SPEC, seed=1)
    activate(model, "default")
    assert torch.equal(model(IDS).logits, before)
    after = {
        name: parameter.data_ptr() for name, parameter in model.named_parameters() if "lora_" not in name
    }
    assert after == weights
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_insert_lora_draws_each_module_from_seed_and_name_alone(tiny_model: ModelMaker) -> None:
    every, few, other = tiny_model(), tiny_model(), tiny_model()
    insert_lora(every, SPEC, seed=1)
    insert_lora(few, LoraSpec(rank=4, alpha=8, targets=("v_proj",)), seed=1)
    insert_lora(other, SPEC, seed=2)
    of_every, of_other = adapter_parameters(every, "default"), adapter_parameters(other, "default")
    of_few = adapter_parameters(few, "default")
    assert len(of_few) == 4
    for key, parameter in of_few.items():
        assert torch.equal(parameter, of_every[key])
    assert not torch.equal(
        of_every["model.layers.0.mlp.up_proj.lora_A"], of_other["model.layers.0.mlp.up_proj.lora_A"]
    )
    first, second = (of_every[f"model.layers.{i}.mlp.up_proj.lora_A"] for i in (0, 1))
    assert not torch.equal(first, second)
    assert first.abs().max() <= 32**-0.5  # Kaiming uniform with a = sqrt(5): bound 1 / sqrt(inputs)


def test_all_linear_takes_every_linear_layer_but_the_head(tiny_model: ModelMaker) -> None:
    modules = target_modules(tiny_model(tie_word_embeddings=False), "all-linear")
    assert len(modules) == 14
    assert "lm_head" not in modules


def test_insert_lora_refuses_a_target_that_matches_nothing(tiny_model: ModelMaker) -> None:
    with pytest.raises(InvalidArgument, match=r"target 'proj' matches no linear layer.*'q_proj'"):
        insert_lora(tiny_model(), LoraSpec(rank=4, alpha=8, targets=("proj",)), seed=1)


def test_insert_lora_refuses_a_name_that_is_taken_or_malformed(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, SPEC, seed=1, name="a")
    with pytest.raises(AlreadyExists, match="already has an adapter named 'a'"):
        insert_lora(model, SPEC, seed=1, name="a")
    with pytest.raises(InvalidArgument, match=r"got 'a\.b'"):
        insert_lora(model, SPEC, seed=1, name="a.b")


@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear_gradients_equal_float64_autograd(bias: bool) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(12, 7, bias=bias).requires_grad_(requires_grad=False)
    layer = LoraLinear(linear, AdapterSwitch(), "layer")
    layer.add("a", Factors(torch.randn(3, 12), torch.randn(7, 3)), 0.5)
    layer.switch.active = "a"
    x = torch.randn(2, 5, 12, requires_grad=True)
    upstream = torch.randn(2, 5, 7)
    layer(x).backward(upstream)

    a, b, wide = (t.detach().double().requires_grad_() for t in (layer.lora_A["a"], layer.lora_B["a"], x))
    expected = nn.functional.linear(wide, linear.weight.double(), linear.bias.double() if bias else None)
    (expected + 0.5 * (wide @ a.T) @ b.T).backward(upstream.double())  # type: ignore[no-untyped-call]
    torch.testing.assert_close(layer.lora_A["a"].grad.double(), a.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.lora_B["a"].grad.double(), b.grad, rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    assert linear.weight.grad is None


def test_patterns_give_modules_ranks_and_alphas_of_their_own(tiny_model: ModelMaker) -> None:
    spec = LoraSpec(
        rank=4,
        alpha=8,
        rank_pattern=(("k_proj", 2), (r"layers\.1\.mlp\..*", 6)),
        alpha_pattern=(("q_proj", 3),),
    )
    strengths = spec.strengths(target_modules(tiny_model(), "all-linear"))
    assert strengths["model.layers.0.self_attn.k_proj"] == (2, 4.0), "alpha stays as it is"
    assert strengths["model.layers.1.mlp.up_proj"] == (6, 8 / 6)
    assert strengths["model.layers.0.mlp.up_proj"] == (4, 2.0)
    assert strengths["model.layers.0.self_attn.q_proj"] == (4, 0.75)
    model = tiny_model()
    insert_lora(model, spec, seed=1)
    parameters = adapter_parameters(model, "default")
    assert parameters["model.layers.1.self_attn.k_proj.lora_A"].shape == (2, 32)
    assert parameters["model.layers.1.mlp.up_proj.lora_B"].shape == (48, 6)
    same = tiny_model()
    insert_lora(same, SPEC, seed=1)
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert torch.equal(parameters[name], adapter_parameters(same, "default")[name])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"rank_pattern": (("gate", 2),)},
            r"'gate' of rank_pattern must match a module .* they end in \['down_proj', ",
        ),
        (
            {"alpha_pattern": (("lm_head", 2.0),)},
            r"'lm_head' of alpha_pattern .* the first is 'model\.layers\.0\.mlp\.down_proj'",
        ),
        (
            {"rank_pattern": (("k_proj", 2), (r".*attn.*", 3))},
            r"'\.\*attn\.\*' of rank_pattern says 3 of model\.layers\.0\.self_attn\.k_proj, of which 'k_proj' says 2",
        ),
        (
            {"rank_pattern": (("(", 2),)},
            "'\\(' of rank_pattern must be a regular expression of Python and of RE2",
        ),
    ],
)
def test_patterns_that_mean_nothing_or_two_things_are_refused(
    tiny_model: ModelMaker, patterns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        insert_lora(tiny_model(), LoraSpec(rank=4, alpha=8, **patterns), seed=1)
    assert caught.value.reason == Reason.MODULE_PATTERN_INVALID


def test_patterns_that_agree_may_overlap(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=4, alpha=8, rank_pattern=(("k_proj", 2), (".*attn.*", 2))), seed=1)
    assert adapter_parameters(model, "default")["model.layers.1.self_attn.o_proj.lora_A"].shape == (2, 32)


@pytest.mark.parametrize(
    "patterns", [{"rank_pattern": (("q_proj", 0),)}, {"alpha_pattern": (("q_proj", 0.0),)}]
)
def test_values_of_patterns_have_the_limits_of_what_they_replace(patterns: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="must be"):
        LoraSpec(rank=4, alpha=8, **patterns)


def test_lora_on_a_bfloat16_base_keeps_float32_factors_and_gradients(tiny_model: ModelMaker) -> None:
    model = tiny_model().to(torch.bfloat16)
    insert_lora(model, SPEC, seed=1)
    fill_b(model, "default")
    with use_adapter(model, "default"):
        packed_forward(model, IDS[0], torch.arange(6), (0, 6)).float().square().mean().backward()  # type: ignore[no-untyped-call]
    for parameter in adapter_parameters(model, "default").values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_backward_is_deterministic_over_thread_counts(tiny_model: ModelMaker) -> None:
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = tiny_model()
        insert_lora(model, SPEC, seed=1)
        fill_b(model, "default")
        with use_adapter(model, "default"):
            model(IDS.repeat(4, 8)).logits.square().mean().backward()
        gradients.append([p.grad for p in adapter_parameters(model, "default").values()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_use_adapter_chooses_between_base_and_several_adapters(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    base = model(IDS).logits
    for seed, name in enumerate(("a", "b")):
        insert_lora(model, SPEC, seed=seed, name=name)
        fill_b(model, name, seed)
    with use_adapter(model, "a"):
        of_a = model(IDS).logits
        with use_adapter(model, "b"):
            of_b = model(IDS).logits
        with use_adapter(model, None):
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, of_a)
    assert torch.equal(model(IDS).logits, base)
    assert not torch.allclose(of_a, of_b)
    assert not torch.allclose(of_a, base)


def test_inserting_a_second_adapter_leaves_the_first_trainable(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, SPEC, seed=0, name="a")
    insert_lora(model, SPEC, seed=0, name="b")
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "a").values())


def test_remove_adapter_gives_the_base_back(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    base = model(IDS).logits
    insert_lora(model, SPEC, seed=0)
    fill_b(model, "default")
    activate(model, "default")
    remove_adapter(model, "default")
    assert torch.equal(model(IDS).logits, base)
    with pytest.raises(NotFound, match=r"no adapter 'default'; it has \[\]"):
        activate(model, "default")


def test_dropping_drops_the_same_of_a_row_whatever_it_is_packed_with(tiny_model: ModelMaker) -> None:
    """Every layer's updates, and their gradients' sums, are those of the rows alone, within rounding."""
    lengths = {5: 4, 9: 7, 2: 3}
    ids = {row: [(row * 7 + place) % 90 + 3 for place in range(length)] for row, length in lengths.items()}
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(model, "default").values():
        parameter.data.normal_(std=0.3, generator=generator)

    def hidden(rows: list[int], seed: int = 3, probability: float = 0.5) -> dict[int, torch.Tensor]:
        batch = pack([ids[row] for row in rows], {}, rows)
        with use_adapter(model, "default"), dropping(model, batch, probability, seed), torch.no_grad():
            found = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
        return dict(zip(rows, torch.split(found, [lengths[row] for row in rows]), strict=True))

    together, turned = hidden([5, 9, 2]), hidden([2, 5, 9])
    for row in lengths:
        alone = hidden([row])[row]
        for packed in (together, turned):
            torch.testing.assert_close(packed[row], alone, rtol=1e-4, atol=1e-4)
        assert (hidden([row], seed=4)[row] - alone).abs().max() > 0.05
        assert (hidden([row], probability=0.0)[row] - alone).abs().max() > 0.05
    with use_adapter(model, "default"), torch.no_grad():
        batch = pack([ids[5]], {}, [5])
        plain = packed_forward(model, batch.input_ids, batch.position_ids, batch.cu_seqlens)
    torch.testing.assert_close(plain, hidden([5], probability=0.0)[5])
