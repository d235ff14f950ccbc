import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from luthier.client.adapter_base import based
from luthier.errors import InvalidArgument, NotFound
from luthier.lm.adapter_files import adapter_config, adapter_state, load_adapter, save_adapter
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter

ModelMaker = Callable[..., Any]

IDS = torch.tensor([[5, 9, 11, 40, 3, 17]])
TARGETS = [("q_proj", "v_proj"), "all-linear"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def with_adapter(model: Any, targets: Any = "all-linear", use_rslora: bool = False) -> Any:
    insert_lora(model, LoraSpec(rank=4, alpha=8, targets=targets, use_rslora=use_rslora), seed=1)
    fill(adapter_parameters(model, "default"))
    return model


def fill(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        parameter.data.normal_(std=0.2, generator=generator)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def peft_model(model: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(6)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return wrapped


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_we_train_loads_in_peft_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, family: str, targets: Any, use_rslora: bool
) -> None:
    ours = with_adapter(tiny_model(family), targets, use_rslora)
    save_adapter(ours, "default", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    with use_adapter(ours, "default"):
        logits = ours(IDS).logits
    torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, tiny_model(family)(IDS).logits, atol=1e-2)


def test_an_adapter_that_names_its_base_loads_by_itself(tiny_model: ModelMaker, tmp_path: Path) -> None:
    """As a download writes it."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    ours = with_adapter(tiny_model())
    save_adapter(ours, "default", tmp_path / "tuned", base_model="projects/default/models/base")
    config = tmp_path / "tuned" / "adapter_config.json"
    with pytest.raises(OSError, match="projects/default/models/base"):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "tuned"))
    config.write_bytes(based(config.read_bytes(), str(tmp_path / "base"), ""))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "tuned")).eval()
    with use_adapter(ours, "default"):
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*layers\.1\.mlp\.up_proj"])
def test_what_peft_trained_loads_here_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, targets: Any, use_rslora: bool
) -> None:
    theirs = peft_model(tiny_model(), target_modules=targets, use_rslora=use_rslora)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    load_adapter(ours, tmp_path, "tuned")
    with use_adapter(ours, "tuned"):
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_adapter_files_hold_exactly_peft_keys_shapes_and_types(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    theirs = peft_model(tiny_model(), target_modules=["q_proj", "v_proj"])
    theirs.save_pretrained(tmp_path)
    model = with_adapter(tiny_model(), ("q_proj", "v_proj"))
    expected = peft.get_peft_model_state_dict(theirs)
    state = adapter_state(model, "default")
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    written["target_modules"].sort()
    assert adapter_config(model, "default", base_model=written["base_model_name_or_path"]) == written


def test_dropout_is_written_and_read_as_peft_does_and_changes_no_answer(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    theirs = peft_model(tiny_model(), lora_dropout=0.25)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model()
    assert load_adapter(ours, tmp_path / "theirs", "tuned").spec.dropout == 0.25
    with use_adapter(ours, "tuned"):
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    save_adapter(ours, "tuned", tmp_path / "ours")
    assert peft.LoraConfig.from_pretrained(str(tmp_path / "ours")).lora_dropout == 0.25


def test_target_modules_are_full_names_where_the_ends_pick_too_much(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=4, alpha=8, targets=("layers.1.mlp.up_proj",)), seed=1)
    assert adapter_config(model, "default")["target_modules"] == ["model.layers.1.mlp.up_proj"]


def test_saving_twice_writes_equal_bytes(tiny_model: ModelMaker, tmp_path: Path) -> None:
    digests = []
    for folder in ("a", "b"):
        save_adapter(with_adapter(tiny_model()), "default", tmp_path / folder)
        files = sorted((tmp_path / folder).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]


def test_load_after_save_restores_every_factor(tiny_model: ModelMaker, tmp_path: Path) -> None:
    saved, loaded = with_adapter(tiny_model()), tiny_model()
    save_adapter(saved, "default", tmp_path)
    adapter = load_adapter(loaded, tmp_path, "again")
    assert (adapter.spec.rank, adapter.spec.alpha) == (4, 8)
    before, after = adapter_parameters(saved, "default"), adapter_parameters(loaded, "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["norm"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("a_feature_of_tomorrow", "on"),
    ],
)
def test_load_adapter_refuses_unsupported_features_by_name(
    tiny_model: ModelMaker, tmp_path: Path, key: str, value: Any
) -> None:
    save_adapter(with_adapter(tiny_model()), "default", tmp_path)
    change_config(tmp_path, **{key: value})
    with pytest.raises(InvalidArgument, match=key):
        load_adapter(tiny_model(), tmp_path, "x")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora_loads_in_peft_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, family: str, *, use_rslora: bool
) -> None:
    ours = tiny_model(family)
    insert_lora(ours, LoraSpec(rank=4, alpha=8, use_rslora=use_rslora, use_dora=True), seed=1)
    fill(adapter_parameters(ours, "default"))
    save_adapter(ours, "default", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    with use_adapter(ours, "default"):
        logits = ours(IDS).logits
    torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, tiny_model(family)(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dora_that_peft_trained_loads_here_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, family: str
) -> None:
    """Its dropout, which the two of us would apply otherwise, says how it was trained."""
    theirs = peft_model(tiny_model(family), use_dora=True, lora_dropout=0.1, rank_pattern={"q_proj": 2})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_model(family)
    assert load_adapter(ours, tmp_path / "theirs", "tuned").spec.use_dora
    with use_adapter(ours, "tuned"):
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    save_adapter(ours, "tuned", tmp_path / "ours")
    written, again = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours")
    )
    assert written.keys() == again.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


@pytest.mark.parametrize("use_dora", [False, True])
def test_magnitudes_belong_to_dora_alone(tiny_model: ModelMaker, tmp_path: Path, *, use_dora: bool) -> None:
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=4, alpha=8, use_dora=use_dora), seed=1)
    save_adapter(model, "default", tmp_path)
    change_config(tmp_path, use_dora=not use_dora)
    with pytest.raises(
        InvalidArgument, match="must have lora_magnitude_vector exactly where use_dora is true, it is"
    ):
        load_adapter(tiny_model(), tmp_path, "x")


PATTERNS: dict[str, Any] = {
    "rank_pattern": {
        "k_proj": 2,
        r"layers\.1\.mlp\.(up|down)_proj": 6,
        "^model.layers.0.self_attn.o_proj": 3,
    },
    "alpha_pattern": {"mlp.gate_proj": 5.5, r".*\.1\.self_attn\..*": 32},
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_by_pattern_load_in_peft_and_back_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, family: str, *, use_rslora: bool
) -> None:
    patterns: dict[str, Any] = {key: tuple(value.items()) for key, value in PATTERNS.items()}
    ours = tiny_model(family)
    insert_lora(ours, LoraSpec(rank=4, alpha=8, use_rslora=use_rslora, **patterns), seed=1)
    fill(adapter_parameters(ours, "default"))
    save_adapter(ours, "default", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "ours").eval()
    with use_adapter(ours, "default"):
        logits = ours(IDS).logits
    torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    plain = tiny_model(family)
    insert_lora(
        plain, LoraSpec(rank=4, alpha=8, use_rslora=use_rslora, rank_pattern=patterns["rank_pattern"]), seed=1
    )
    fill(adapter_parameters(plain, "default"))
    with use_adapter(plain, "default"):
        assert not torch.allclose(logits, plain(IDS).logits, atol=1e-2), "alphas count"
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = tiny_model(family)
    spec = load_adapter(back, tmp_path / "theirs", "tuned").spec
    assert {key: dict(getattr(spec, key)) for key in PATTERNS} == PATTERNS
    with use_adapter(back, "tuned"):
        assert torch.equal(back(IDS).logits, logits)


def test_what_peft_trained_by_pattern_loads_here_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Where several match a module, the first in the file counts for both."""
    overlapping = {
        "alpha_pattern": {".*attn.*": 40, "q_proj": 2},
        "rank_pattern": {".*attn.*": 2, "v_proj": 6},
    }
    theirs = peft_model(tiny_model(), **overlapping)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    load_adapter(ours, tmp_path, "tuned")
    with use_adapter(ours, "tuned"):
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_order_of_patterns_outlives_loading_and_saving(tiny_model: ModelMaker, tmp_path: Path) -> None:
    order = (("q_proj", 2.0), (".*attn.*", 40.0))
    model = with_adapter(tiny_model())
    save_adapter(model, "default", tmp_path)
    change_config(tmp_path, alpha_pattern=dict(order))
    loaded = tiny_model()
    load_adapter(loaded, tmp_path, "again")
    save_adapter(loaded, "again", tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert list(written["alpha_pattern"].items()) == list(order)
    assert list(written) == sorted(written)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"rank_pattern": {"q_proj": 8}},
            r"q_proj must have shapes \[\(8, 32\), \(32, 8\)\], got \[\(4, 32\)",
        ),
        (
            {"rank_pattern": {"query": 4}},
            "'query' of rank_pattern must match a module that the adapter changes",
        ),
        (
            {"alpha_pattern": {r"(?=q)": 4}},
            "of alpha_pattern must be a regular expression of Python and of RE2",
        ),
        (
            {"rank_pattern": {"q_proj": "4"}},
            "rank_pattern of an adapter must hold a number for each pattern, got",
        ),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern of an adapter must hold a number for each pattern, got"),
        (
            {"alpha_pattern": {"q_proj": True}},
            "alpha_pattern of an adapter must hold a number for each pattern",
        ),
    ],
)
def test_load_adapter_ignores_no_pattern(
    tiny_model: ModelMaker, tmp_path: Path, patterns: dict[str, Any], message: str
) -> None:
    save_adapter(with_adapter(tiny_model()), "default", tmp_path)
    change_config(tmp_path, **patterns)
    with pytest.raises(InvalidArgument, match=message):
        load_adapter(tiny_model(), tmp_path, "x")


def test_load_adapter_refuses_tensors_of_another_model(tiny_model: ModelMaker, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_model(hidden_size=64)), "default", tmp_path)
    with pytest.raises(InvalidArgument, match=r"must have shapes .* got"):
        load_adapter(tiny_model(), tmp_path, "x")


def test_load_adapter_names_a_missing_file(tiny_model: ModelMaker, tmp_path: Path) -> None:
    save_adapter(with_adapter(tiny_model()), "default", tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(NotFound, match=r"must hold adapter_model\.safetensors"):
        load_adapter(tiny_model(), tmp_path, "x")
