import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import InvalidArgument, NotFound, ResourceExhausted
from luthier.lm.attention import IMPLEMENTATION
from luthier.lm.load import eos_token_ids, load_model

ModelMaker = Callable[..., Any]


def saved(model: Any, directory: Path) -> Any:
    model.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_load_model_gives_the_saved_weights_frozen_in_eval_mode(
    tiny_model: ModelMaker, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    loaded: Any = load_model(saved(model, tmp_path), torch.float32)
    expected = dict(model.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == expected.keys()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    assert loaded.config._attn_implementation == IMPLEMENTATION
    assert loaded.lm_head.weight is loaded.base_model.embed_tokens.weight


def test_loading_in_several_threads_leaves_the_process_as_it_was(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """transformers changes the default type and whether weights are tied, for all threads, while it loads."""
    folder = saved(tiny_model(), tmp_path)
    with ThreadPoolExecutor(4) as threads:
        loaded = list(threads.map(lambda _: load_model(folder), range(24)))
    assert torch.get_default_dtype() == torch.float32
    assert all(one.lm_head.weight is one.get_input_embeddings().weight for one in loaded)
    assert load_model(folder).lm_head.weight.dtype == torch.bfloat16


def test_load_model_is_bfloat16_unless_told_otherwise(tiny_model: ModelMaker, tmp_path: Path) -> None:
    assert {p.dtype for p in load_model(saved(tiny_model(), tmp_path)).parameters()} == {torch.bfloat16}


def test_load_model_places_all_weights_on_the_device(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = load_model(saved(tiny_model(), tmp_path), device="meta")
    assert {one.device.type for one in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_weights_that_do_not_fit_on_a_gpu_are_named(
    tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    folder = saved(tiny_model(), tmp_path)
    monkeypatch.setattr("luthier.lm.load.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(ResourceExhausted) as caught:
        load_model(folder, device="meta")
    assert (caught.value.reason, caught.value.metadata) == ("OUT_OF_MEMORY", {"device": "meta"})
    assert caught.value.message == (
        "the model's weights must fit in the memory of meta, they do not: CUDA out of memory. Tried to allocate 2 GiB"
    )


def test_load_model_holds_no_whole_model_on_the_processor_on_the_way(
    tiny_model: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor goes to the device as it is read: the model is there before anybody moves it."""
    move, seen = torch.nn.Module.to, []

    def seeing(self: torch.nn.Module, *words: Any, **named: Any) -> torch.nn.Module:
        seen.append({one.device.type for one in self.parameters()})
        return move(self, *words, **named)

    monkeypatch.setattr(torch.nn.Module, "to", seeing)
    load_model(saved(tiny_model(), tmp_path), device="meta")
    assert seen == [{"meta"}]


def test_load_model_refuses_another_architecture_by_name(tiny_model: ModelMaker, tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path)
    edit_config(tmp_path, architectures=["GPT2LMHeadModel"])
    with pytest.raises(InvalidArgument, match=r"LlamaForCausalLM.*got \['GPT2LMHeadModel'\]"):
        load_model(tmp_path)


def test_load_model_refuses_code_that_comes_with_a_model(tiny_model: ModelMaker, tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path)
    edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(InvalidArgument, match=r"auto_map=.*modeling_x") as caught:
        load_model(tmp_path)
    assert caught.value.reason == "UNSAFE_MODEL_FILE"


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_load_model_refuses_weights_that_are_not_exactly_the_models(
    tiny_model: ModelMaker, tmp_path: Path, change: str
) -> None:
    saved(tiny_model(), tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights[name := "model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
    else:
        weights[name] = torch.zeros(48, 31)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"up_proj") as caught:
        load_model(tmp_path)
    assert caught.value.reason == "MODEL_INVALID"


def test_load_model_names_what_is_missing_or_broken(tiny_model: ModelMaker, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"must hold config\.json"):
        load_model(tmp_path)
    saved(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(InvalidArgument, match="must be readable"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InvalidArgument, match="must hold an object, got list"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match="must be JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, {2}),
        (2, 5, {2, 5}),
        ([2, 3], [5, 6], {2, 3, 5, 6}),
        (None, [7], {7}),
        (None, None, set()),
    ],
)
def test_eos_token_ids_are_all_that_the_files_name(
    tiny_model: ModelMaker, tmp_path: Path, in_config: Any, in_generation: Any, expected: set[int]
) -> None:
    saved(tiny_model(), tmp_path)
    edit_config(tmp_path, eos_token_id=in_config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert eos_token_ids(load_model(tmp_path)) == expected


def test_an_end_of_sequence_that_is_no_token_is_refused(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    for wrong in ("2", [2, "3"], True, [[2]]):
        model.generation_config.eos_token_id = wrong
        with pytest.raises(InvalidArgument, match="eos_token_id must be a token's id") as caught:
            eos_token_ids(model)
        assert caught.value.reason == "MODEL_INVALID"
