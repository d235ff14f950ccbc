"""Merging: what is written computes what the adapter computes, or is not written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.lm.made_models import adapter_folder, model_folder
from transformers import AutoModelForCausalLM

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.kernels.dequantise import dense
from luthier.lm.lora import LoraSpec
from luthier.lm.lora_layer import LoraLinear
from luthier.lm.made import Made
from luthier.lm.merging import MERGED_BOUND, UNROUNDED_BOUND, merge_files
from luthier.lm.precision import Precision
from luthier.lm.quantise import quantised

ModelMaker = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 9, 11, 40, 3, 17, 60, 2]])
QUANTISED: tuple[Precision, ...] = ("INT8", "NF4")
SPECS = {
    "plain": LoraSpec(rank=4, alpha=8),
    "rslora": LoraSpec(rank=4, alpha=8, use_rslora=True),
    "some modules": LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj")),
    "patterns": LoraSpec(
        rank=4,
        alpha=8,
        rank_pattern=(("q_proj", 8), ("layers.1.mlp.up_proj", 2)),
        alpha_pattern=(("v_proj", 32),),
    ),
    "dora": LoraSpec(rank=4, alpha=8, use_dora=True, use_rslora=True),
    "tied weights": LoraSpec(rank=4, alpha=8, trained_modules=("embed_tokens",)),
}


@pytest.fixture
def base(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    return model_folder(tiny_model(vocab_size=262), tmp_path / "base")


def merged(base: Path, adapter: Path, folder: Path) -> Made:
    made = merge_files(base, adapter, folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return made


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers and PEFT, which know nothing of us, compute in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found - reference).norm() / (reference - reference.mean(-1, keepdim=True)).norm())


@pytest.mark.parametrize("name", SPECS)
def test_merged_weights_compute_what_peft_computes_with_the_adapter(
    base: Path, tmp_path: Path, name: str
) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS[name])
    made = merged(base, adapter, tmp_path / "merged")
    expected = logits(base, adapter)
    distance = relative(logits(tmp_path / "merged"), expected)
    assert distance < MERGED_BOUND
    assert relative(logits(base), expected) > 5 * distance  # so the adapter does something, and that is kept
    check = made.check
    assert check.unrounded_difference < UNROUNDED_BOUND / 10
    assert 0 < check.difference < MERGED_BOUND == check.bound
    assert check.effect > 5 * check.difference
    assert check.num_greedy_tokens == 4 * 16
    assert check.num_equal_greedy_tokens <= check.num_greedy_tokens
    assert made.warnings == ()


def test_untied_heads_and_embeddings_take_the_place_of_the_bases(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    base = model_folder(tiny_model(vocab_size=262, tie_word_embeddings=False), tmp_path / "base")
    spec = LoraSpec(rank=4, alpha=8, trained_modules=("embed_tokens", "lm_head"))
    adapter = adapter_folder(base, tmp_path / "adapter", spec)
    merged(base, adapter, tmp_path / "merged")
    assert relative(logits(tmp_path / "merged"), logits(base, adapter)) < MERGED_BOUND
    own, trained = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    for module in ("lm_head", "model.embed_tokens"):
        expected = trained[f"base_model.model.{module}.weight"].to(torch.bfloat16)
        assert torch.equal(own[f"{module}.weight"], expected)


def test_a_merge_is_one_file_with_the_bases_names_in_bfloat16(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["tied weights"])
    made = merged(base, adapter, tmp_path / "merged")
    assert [name for name, _ in made.files] == ["model.safetensors"]
    weights, own = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == own.keys()  # tied: the head is not stored twice
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = merge_files(base, adapter, tmp_path / "again")
    assert again.files[0][1].read_bytes() == made.files[0][1].read_bytes()


def held_in(base: Path, folder: Path, precision: Precision) -> Path:
    """Write a base whose linear layers have the numbers that a precision holds of them."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = dense(quantised(weight, precision)).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("name", ["plain", "dora"])
def test_an_adapter_is_added_to_the_numbers_that_it_was_trained_beside(
    base: Path, tmp_path: Path, name: str, precision: Precision
) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS[name])
    made = merge_files(base, adapter, tmp_path / "merged", precision=precision)
    held = held_in(base, tmp_path / "held", precision)
    on_held = merged(held, adapter, tmp_path / "on-held")
    assert made.files[0][1].read_bytes() == on_held.files[0][1].read_bytes()
    assert relative(logits(tmp_path / "on-held"), logits(held, adapter)) < MERGED_BOUND
    check = made.check
    assert check.difference == on_held.check.difference < MERGED_BOUND
    assert check.base_difference > (1e-4 if precision == "INT8" else 0.02)
    assert on_held.check.base_difference == 0
    (warning,) = made.warnings
    assert f"was trained beside a base in {precision} and is added to the numbers" in warning


def test_a_base_that_cannot_be_held_so_is_refused_by_name(tiny_model: ModelMaker, tmp_path: Path) -> None:
    base = model_folder(tiny_model(vocab_size=262, intermediate_size=33), tmp_path / "base")
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["plain"])
    with pytest.raises(
        InvalidArgument, match=r"mlp\.gate_proj of this model cannot be held in NF4"
    ) as caught:
        merge_files(base, adapter, tmp_path / "merged", precision="NF4")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_an_adapter_that_rounding_swallows_is_told_of(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["plain"], strength=1e-5)
    made = merged(base, adapter, tmp_path / "merged")
    (warning,) = made.warnings
    assert "little of what was learnt is left; the adapter itself has all" in warning


@pytest.mark.parametrize("factor", [0.0, 0.98, 1.02])
def test_what_computes_something_else_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """A sum that is slightly wrong is found before rounding hides it."""
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["plain"])
    right = LoraLinear.merged_weight

    def wrong(layer: LoraLinear, name: str) -> torch.Tensor:
        return torch.lerp(layer.weight, right(layer, name), factor)

    monkeypatch.setattr(LoraLinear, "merged_weight", wrong)
    with pytest.raises(
        FailedPrecondition, match=r"must differ .* by at most 0.001 of their spread"
    ) as caught:
        merge_files(base, adapter, tmp_path / "merged")
    assert caught.value.reason == Reason.WEIGHTS_DIFFER
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_no_numbers_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["plain"], strength=float("inf"))
    with pytest.raises(FailedPrecondition, match="they do by nan"):
        merge_files(base, adapter, tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(base: Path, tiny_model: ModelMaker, tmp_path: Path) -> None:
    other = model_folder(tiny_model(vocab_size=262, hidden_size=64), tmp_path / "other")
    adapter = adapter_folder(other, tmp_path / "adapter", SPECS["plain"])
    with pytest.raises(InvalidArgument, match="must have shapes") as caught:
        merge_files(base, adapter, tmp_path / "merged")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_work_that_is_wanted_no_more_ends_within_its_parts(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", SPECS["plain"])

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(base, adapter, tmp_path / "merged", check)
    assert not (tmp_path / "merged").exists()
