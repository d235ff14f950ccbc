import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.lm import hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.lm.load import load_model
from luthier.lm.register import register_source
from luthier.lm.sources import DirectorySource, GgufSource, HubSource

ModelMaker = Callable[..., Any]

tokenizer_class: Any = PreTrainedTokenizerFast
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + [chr(code) for code in range(33, 33 + 93)] + ["ab"]
BUNDLE = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
FILES = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", *BUNDLE[1:]]


def tokenizer() -> Any:
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return tokenizer_class(tokenizer_object=core, eos_token="<|im_end|>", chat_template=TEMPLATE)


@pytest.fixture
def directory(tiny_model: ModelMaker, tmp_path: Path) -> Any:
    path = tmp_path / "source"
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def permuted(weight: Any, heads: int | None) -> Any:
    """Rows as llama.cpp stores queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Any, path: Path) -> Any:
    """The model as a GGUF file with its values vectors in 4 bits; returns the values that the file holds."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(97)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected = {}
    for name, parameter in model.named_parameters():
        weight = expected[name] = parameter.detach().numpy()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", weight)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", weight)
        else:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            stored = f"blk.{layer}.{GGUF_NAMES[part]}.weight"
            if part == "self_attn.v_proj":
                packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
                expected[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
                writer.add_tensor(stored, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
                continue
            heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
            writer.add_tensor(stored, np.ascontiguousarray(permuted(weight, heads)) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(np.array(weight)).to(torch.bfloat16) for name, weight in expected.items()}


def digests(result: Any) -> Any:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in result.files}


def test_register_gguf_writes_the_expanded_weights_and_the_tokenizer_bundle(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    expected = write_gguf(tiny_model(), tmp_path / "tiny.gguf")
    source = GgufSource(path=tmp_path / "tiny.gguf")
    result = register_source(source, tmp_path / "out", scratch=tmp_path / "scratch")
    assert [name for name, _ in result.files] == FILES
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == expected.keys()  # tied: the vocabulary head is not stored twice
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert result.architecture == "LlamaForCausalLM"
    assert result.num_parameters == sum(weight.numel() for weight in expected.values())
    assert (result.context_length, result.vocab_size, result.dtype) == (256, 97, "bfloat16")
    assert result.has_chat_template
    assert result.eos_token_ids == result.end_of_turn_token_ids == (2,)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    loaded: Any = load_model(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.base_model.embed_tokens.weight


def test_registering_twice_writes_equal_bytes(
    directory: Path, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    write_gguf(tiny_model(), tmp_path / "tiny.gguf")
    for source in (GgufSource(path=tmp_path / "tiny.gguf"), DirectorySource(path=directory)):
        kind = type(source).__name__
        results = [register_source(source, tmp_path / kind / n, scratch=tmp_path / "s") for n in "ab"]
        assert digests(results[0]) == digests(results[1])


@pytest.mark.parametrize("tied", [True, False])
def test_register_directory_keeps_weights_and_ties(
    tiny_model: ModelMaker, tmp_path: Path, tied: bool
) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "source", max_shard_size="10KB")
    tokenizer().save_pretrained(tmp_path / "source")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    source = DirectorySource(path=tmp_path / "source")
    result = register_source(source, tmp_path / "out", scratch=tmp_path / "s")
    assert [name for name, _ in result.files] == FILES
    assert result.architecture == "Qwen2ForCausalLM"
    loaded: Any = load_model(tmp_path / "out")
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name].to(torch.bfloat16))
    assert (loaded.lm_head.weight is loaded.base_model.embed_tokens.weight) == tied
    bundle = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert bundle("abc")["input_ids"] == tokenizer()("abc")["input_ids"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "state.pkl", "optimizer.CKPT"])
def test_register_directory_refuses_pickles_by_name(directory: Path, tmp_path: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    with pytest.raises(InvalidArgument, match=name.replace(".", r"\.")) as caught:
        register_source(DirectorySource(path=directory), tmp_path / "out", scratch=tmp_path / "s")
    assert caught.value.reason == "UNSAFE_MODEL_FILE"


def test_register_directory_refuses_links_and_code(directory: Path, tmp_path: Path) -> None:
    source = DirectorySource(path=directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(InvalidArgument, match="auto_map"):
        register_source(source, tmp_path / "out", scratch=tmp_path / "s")
    config.unlink()
    config.symlink_to("/etc/hostname")
    with pytest.raises(InvalidArgument, match=r"config\.json is a symbolic link"):
        register_source(source, tmp_path / "out", scratch=tmp_path / "s")


def test_register_refuses_what_is_not_there_or_not_a_gguf(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "s"
    with pytest.raises(NotFound, match=r"no GGUF file a\.gguf"):
        register_source(GgufSource(path=tmp_path / "a.gguf"), out, scratch=scratch)
    with pytest.raises(NotFound, match="no model directory nowhere"):
        register_source(DirectorySource(path=tmp_path / "nowhere"), out, scratch=scratch)
    (tmp_path / "a.gguf").write_bytes(b"lk_a-secret-key")
    with pytest.raises(InvalidArgument, match=r"must begin with the bytes GGUF, a\.gguf does not") as caught:
        register_source(GgufSource(path=tmp_path / "a.gguf"), out, scratch=scratch)
    assert "lk_a" not in str(caught.value)
    (tmp_path / "b.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(InvalidArgument, match="must hold what it announces"):
        register_source(GgufSource(path=tmp_path / "b.gguf"), out, scratch=scratch)
    (out / "old").write_text("")
    with pytest.raises(InvalidArgument, match="must be empty"):
        register_source(GgufSource(path=tmp_path / "a.gguf"), out, scratch=scratch)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001])
def test_weights_whose_header_announces_more_than_there_is_are_refused(
    directory: Path, tmp_path: Path, length: int
) -> None:
    """Before anything of that size is taken."""
    path = directory / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidArgument, match="must be readable by transformers") as caught:
        register_source(DirectorySource(path=directory), tmp_path / "out", scratch=tmp_path / "s")
    assert caught.value.reason == Reason.MODEL_INVALID
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"


def test_register_hub_takes_the_safe_files_of_the_commit_that_a_branch_stands_for(
    directory: Path, tmp_path: Path
) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / "modeling.py").write_text("raise SystemExit")
    with hub.serving(directory) as served:
        served.moves_on = True
        source = HubSource(repo_id=hub.REPOSITORY, revision="main", endpoint=served.endpoint)
        result = register_source(source, tmp_path / "out", scratch=tmp_path / "s")
    assert result.hub_commit == hub.COMMIT
    assert served.fetched == {"config.json", "generation_config.json", "model.safetensors", *BUNDLE}
    for unsafe in ("pytorch_model.bin", "modeling.py"):
        (directory / unsafe).unlink()
    local = register_source(DirectorySource(path=directory), tmp_path / "local", scratch=tmp_path / "s2")
    assert digests(result) == digests(local)
    assert local.hub_commit == ""


def test_register_hub_says_what_the_hub_does_not_have(directory: Path, tmp_path: Path) -> None:
    with hub.serving(directory) as served:
        for repo_id, revision in ((hub.REPOSITORY, "v9"), ("org/other", "main")):
            source = HubSource(repo_id=repo_id, revision=revision, endpoint=served.endpoint)
            with pytest.raises(NotFound, match=f"the hub has no {repo_id} at {revision}"):
                register_source(source, tmp_path / "out", scratch=tmp_path / "s")


def test_register_hub_that_is_away_is_unavailable(tmp_path: Path) -> None:
    source = HubSource(repo_id="org/model", revision="main", endpoint="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="the hub did not deliver org/model@main"):
        register_source(source, tmp_path / "out", scratch=tmp_path / "s")


def test_register_hub_refuses_an_id_that_is_none(tmp_path: Path) -> None:
    source = HubSource(repo_id="a/b/c", revision="main", endpoint="http://127.0.0.1:9")
    with pytest.raises(InvalidArgument, match="must be owner/name, got 'a/b/c'"):
        register_source(source, tmp_path / "out", scratch=tmp_path / "s")


def test_register_refuses_a_path_that_became_a_symbolic_link(directory: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(InvalidArgument, match="link is a symbolic link or lies below one") as caught:
        register_source(DirectorySource(path=link), tmp_path / "out", scratch=tmp_path / "s")
    assert caught.value.reason == "UNSAFE_MODEL_FILE"
    with pytest.raises(InvalidArgument, match="symbolic link"):
        register_source(GgufSource(path=link / "a.gguf"), tmp_path / "out", scratch=tmp_path / "s")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors", "missing.safetensors"])
def test_register_directory_refuses_an_index_that_leads_elsewhere(
    directory: Path, tmp_path: Path, place: str
) -> None:
    (directory / "model.safetensors").rename(directory.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": place}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidArgument, match="must name files of its own directory") as caught:
        register_source(DirectorySource(path=directory), tmp_path / "out", scratch=tmp_path)
    assert caught.value.reason == "UNSAFE_MODEL_FILE"
    assert place in str(caught.value)


def test_register_directory_refuses_an_index_that_is_none(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InvalidArgument, match="must hold a weight_map"):
        register_source(DirectorySource(path=directory), tmp_path / "out", scratch=tmp_path)


def test_register_keeps_the_default_of_several_templates(tiny_model: ModelMaker, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "source")
    several = tokenizer()
    several.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    several.save_pretrained(tmp_path / "source")
    made = register_source(DirectorySource(path=tmp_path / "source"), tmp_path / "out", scratch=tmp_path)
    assert [name for name, _ in made.files] == FILES
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
