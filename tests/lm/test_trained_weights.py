import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lm.test_adapter_files import change_config, fill
from transformers import Gemma2Config, Gemma2ForCausalLM

from luthier.errors import InvalidArgument, Reason
from luthier.lm.adapter_files import adapter_state, load_adapter, save_adapter
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.lora import (
    LoraSpec,
    activate,
    adapter_parameters,
    insert_lora,
    muted,
    remove_adapter,
    trained_weights,
    use_adapter,
)
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.readouts import TokenLogprobs, read
from luthier.lm.trained_weights import TRAINABLE

ModelMaker = Callable[..., Any]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.tensor([[5, 9, 11, 40, 3, 17]])
# Tied or not, what is trained.
CASES = [
    (True, ("embed_tokens",)),
    (True, ("embed_tokens", "lm_head")),
    (False, ("embed_tokens",)),
    (False, ("lm_head",)),
    (False, ("lm_head", "embed_tokens")),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning"),
]


def untied(tiny_model: ModelMaker, *, tied: bool) -> Any:
    return tiny_model(tie_word_embeddings=tied)


def with_weights(model: Any, modules: tuple[str, ...], name: str = "default", scale: float = 1.0) -> Any:
    spec = LoraSpec(rank=4, alpha=8, targets=("q_proj",), trained_modules=modules)
    insert_lora(model, spec, seed=1, name=name)
    fill(adapter_parameters(model, name))
    for parameter in adapter_parameters(model, name).values():
        parameter.data.mul_(scale)
    return model


def logits_of(model: Any, name: str | None) -> torch.Tensor:
    with use_adapter(model, name), torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(("tied", "modules"), CASES)
def test_what_we_train_whole_loads_in_peft_and_back_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, modules: tuple[str, ...], *, tied: bool
) -> None:
    ours = with_weights(untied(tiny_model, tied=tied), modules)
    logits = logits_of(ours, "default")
    save_adapter(ours, "default", tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(untied(tiny_model, tied=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, logits_of(ours, None), atol=1e-1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    both = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs")]
    forms = [{key: (value.shape, value.dtype) for key, value in one.items()} for one in both]
    assert forms[0] == forms[1]
    back = untied(tiny_model, tied=tied)
    load_adapter(back, tmp_path / "theirs", "tuned")
    assert torch.equal(logits_of(back, "tuned"), logits)
    shared = trained_weights(back, "tuned")
    assert (len(set(map(id, shared.values()))) < len(shared)) is tied


@pytest.mark.parametrize("ensures", [True, False])
@pytest.mark.parametrize(("tied", "modules"), [*CASES, (True, ("lm_head",))])
def test_what_peft_trained_whole_loads_here_with_equal_logits(
    tiny_model: ModelMaker, tmp_path: Path, modules: tuple[str, ...], *, tied: bool, ensures: bool
) -> None:
    """PEFT parts what is tied unless it is told not to: what it then computes is computed here too."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        modules_to_save=list(modules),
        ensure_weight_tying=ensures,
    )
    theirs: Any = peft.get_peft_model(untied(tiny_model, tied=tied), config).eval()
    generator = torch.Generator().manual_seed(6)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = untied(tiny_model, tied=tied)
    load_adapter(ours, tmp_path / "theirs", "tuned")
    logits = logits_of(ours, "tuned")
    torch.testing.assert_close(logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    save_adapter(ours, "tuned", tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(untied(tiny_model, tied=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_scales_goes_on_scaling(tmp_path: Path) -> None:
    def make() -> Any:
        shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        torch.manual_seed(7)
        model: Any = Gemma2ForCausalLM(Gemma2Config(**shape, **heads))  # type: ignore[arg-type]
        return model.eval()

    ours = with_weights(make(), ("embed_tokens",))
    save_adapter(ours, "default", tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits_of(ours, "default"), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_adapters_of_one_base_do_not_disturb_one_another(tiny_model: ModelMaker) -> None:
    model = tiny_model(tie_word_embeddings=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = logits_of(model, None)
    cases = {"a": ("embed_tokens",), "b": ("lm_head",), "c": ("embed_tokens", "lm_head"), "d": ()}
    for number, (name, modules) in enumerate(cases.items()):
        with_weights(model, modules, name, scale=1 + number)
    alone = {}
    for number, (name, modules) in enumerate(cases.items()):
        one = with_weights(tiny_model(tie_word_embeddings=False), modules, name, scale=1 + number)
        alone[name] = logits_of(one, name)
    for name in ("a", "b", "c", "d", "c", "a", "d", "b"):
        assert torch.equal(logits_of(model, name), alone[name]), name
        assert torch.equal(logits_of(model, None), base)
    activate(model, "c")
    with use_adapter(model, "b"):
        assert torch.equal(model(IDS).logits, alone["b"])
    assert torch.equal(model(IDS).logits, alone["c"])
    remove_adapter(model, "c")
    assert torch.equal(model(IDS).logits, base)
    assert torch.equal(logits_of(model, "a"), alone["a"])
    assert {
        name: tensor for name, tensor in model.state_dict().items() if name in before
    }.keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_adapter_that_is_loaded_while_another_is_active_changes_nothing_of_it(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    save_adapter(with_weights(tiny_model(), ("embed_tokens",), scale=2.0), "default", tmp_path)
    model = with_weights(tiny_model(), ("embed_tokens",), "a")
    base, of_a = logits_of(model, None), logits_of(model, "a")
    activate(model, "a")
    load_adapter(model, tmp_path, "b")
    assert torch.equal(model(IDS).logits, of_a)
    assert torch.equal(logits_of(model, None), base)
    assert not torch.allclose(logits_of(model, "b"), of_a, atol=0.1)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "a").values())


def test_generations_of_several_adapters_at_once_are_those_of_each_alone(tiny_model: ModelMaker) -> None:
    """The engine advances them in turns, each with its own weights."""
    cases: dict[str | None, tuple[str, ...]] = {"a": ("embed_tokens",), "b": (), None: ()}

    def answers(names: list[str | None]) -> dict[str, list[int]]:
        model = tiny_model()
        for number, adapter in enumerate(("a", "b")):
            with_weights(model, cases[adapter], adapter, scale=1 + number)
        engine = Engine(model)
        for name in names:
            request = GenerationRequest(
                request_id=str(name), prompts=((5, 9, 11),), max_new_tokens=8, adapter=name
            )
            engine.submit(request)
        found: dict[str, list[int]] = {}
        while engine.running():
            for event in engine.step():
                found.setdefault(event.request_id, []).extend(event.token_ids)
        return found

    together = answers(["a", "b", None])
    assert together == answers(["a"]) | answers(["b"]) | answers([None])
    assert len({tuple(tokens) for tokens in together.values()}) == 3


def test_the_base_is_seen_where_the_adapter_is_muted(tiny_model: ModelMaker) -> None:
    model = with_weights(tiny_model(), ("embed_tokens",))
    batch = pack([IDS[0].tolist()], {WEIGHT: [[1] * 6]})

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            return read(model, batch, TokenLogprobs()).logprob

    base = logprobs()
    with use_adapter(model, "default"):
        tuned = logprobs()
        with muted(model):
            torch.testing.assert_close(logprobs(), base)
        assert torch.equal(logprobs(), tuned)
    assert not torch.allclose(tuned, base, atol=0.1)


def test_gradients_reach_both_uses_of_a_tied_weight(tiny_model: ModelMaker) -> None:
    model, plain = with_weights(tiny_model(), ("embed_tokens",)), tiny_model()
    plain.model.embed_tokens.weight.data.copy_(trained_weights(model, "default")[EMBEDDING].data)
    plain.requires_grad_(requires_grad=True)
    with use_adapter(model, "default"):
        for layer in model.model.layers:
            layer.self_attn.q_proj.lora_B["default"].data.zero_()
        model(IDS).logits.square().mean().backward()
    plain(IDS).logits.square().mean().backward()
    found = adapter_parameters(model, "default")["model.embed_tokens.weight"].grad
    torch.testing.assert_close(found, plain.model.embed_tokens.weight.grad)
    assert model.model.embed_tokens.weight.grad is None, "the base's"


@pytest.mark.parametrize(
    ("modules", "changes", "message"),
    [
        (("lm_head",), {}, "must name embed_tokens: it and the head are one weight in this model"),
        (("norm",), {}, r"must be one of \['embed_tokens', 'lm_head'\], got 'norm'"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_by_name(
    tiny_model: ModelMaker, modules: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        with_weights(tiny_model(**changes), modules)
    assert caught.value.reason == Reason.TRAINED_MODULE_INVALID


def test_a_head_with_a_bias_is_refused_by_name(tiny_model: ModelMaker) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with pytest.raises(InvalidArgument, match="must name modules without a bias, lm_head has one"):
        with_weights(model, ("lm_head",))


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda state: state.pop(f"base_model.model.{HEAD}.weight"),
            {},
            r"must hold base_model\.model\.lm_head\.weight",
        ),
        (
            lambda state: state[f"base_model.model.{HEAD}.weight"].add_(1),
            {},
            r"must have the same weight of model\.embed_tokens and lm_head, it has two",
        ),
        (
            lambda state: state.update({f"base_model.model.{EMBEDDING}.weight": torch.zeros(98, 32)}),
            {},
            r"model\.embed_tokens\.weight must have shape \(97, 32\), got \(98, 32\)",
        ),
        (
            lambda _: None,
            {"modules_to_save": None, "ensure_weight_tying": False},
            r"must be named base_model\.model\.<module>\.lora_A\.weight .*, got base_model\.model\.",
        ),
        (
            lambda _: None,
            {"modules_to_save": ["embed_tokens", "norm"]},
            "modules_to_save=.*norm.* is not supported",
        ),
    ],
)
def test_load_refuses_what_is_not_whole(
    tiny_model: ModelMaker,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    config: dict[str, Any],
    message: str,
) -> None:
    save_adapter(with_weights(tiny_model(), ("embed_tokens",)), "default", tmp_path)
    changed_tensors(tmp_path, change)
    change_config(tmp_path, **config)
    with pytest.raises(InvalidArgument, match=message) as caught:
        load_adapter(tiny_model(), tmp_path, "x")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_a_tied_weight_is_written_as_peft_writes_it(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = with_weights(tiny_model(), ("embed_tokens",))
    keys = {key for key in adapter_state(model, "default") if "lora" not in key}
    assert keys == {f"base_model.model.{name}.weight" for name in (EMBEDDING, HEAD)}
    assert [key for key in adapter_parameters(model, "default") if "lora" not in key] == [
        f"{EMBEDDING}.weight"
    ]
    save_adapter(model, "default", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["ensure_weight_tying"]) == (["embed_tokens"], True)


def test_a_loaded_weight_is_rounded_to_the_type_of_the_base(tiny_model: ModelMaker, tmp_path: Path) -> None:
    wide = with_weights(tiny_model(), TRAINABLE)
    save_adapter(wide, "default", tmp_path)
    narrow = tiny_model().to(torch.bfloat16)
    load_adapter(narrow, tmp_path, "tuned")
    loaded = trained_weights(narrow, "tuned")[EMBEDDING]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, trained_weights(wide, "default")[EMBEDDING].bfloat16())
