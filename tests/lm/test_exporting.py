"""Exports: GGUF files that hold the model that they were made from, by whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader, TokenType
from tests.lm.made_models import MERGES, TEMPLATE, TOKENS, adapter_folder, model_folder
from tests.lm.test_merging import QUANTISED, held_in, relative
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.lm import exporting, gguf_files
from luthier.lm.exporting import BOUNDS, ExportSource, export_files
from luthier.lm.load import eos_token_ids, load_model
from luthier.lm.lora import LoraSpec
from luthier.lm.made import EXPORTABLE, GgufType, Made
from luthier.lm.precision import Precision
from luthier.lm.register import register_source
from luthier.lm.sources import GgufSource
from luthier.text.tokenizer import TokenizerBundle

ModelMaker = Callable[..., Any]
IDS = torch.tensor([[5, 9, 11, 40, 3, 17, 60, 2]])
FORMS: tuple[GgufType, ...] = ("F16", "Q8_0")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 128},
}


def exported(model: Path, folder: Path, form: GgufType = "F16", adapter: Path | None = None) -> Made:
    return export_files(ExportSource(model=model, adapter=adapter, form=form, title="tiny"), folder)


@pytest.fixture
def base(tiny_model: ModelMaker, tmp_path: Path) -> Path:
    return model_folder(tiny_model(vocab_size=270), tmp_path / "base")


def logits(folder: Path) -> torch.Tensor:
    model: Any = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", SHAPES)
def test_an_export_registers_again_as_the_model_that_it_was(
    tiny_model: ModelMaker, tmp_path: Path, family: str, form: GgufType
) -> None:
    base = model_folder(tiny_model(family, vocab_size=270, **SHAPES[family]), tmp_path / "base")
    made = exported(base, tmp_path / "out", form)
    ((name, path),) = made.files
    assert name == f"model-{form.lower()}.gguf"
    registered = register_source(GgufSource(path=path), tmp_path / "again", scratch=tmp_path / "scratch")
    assert registered.has_chat_template
    assert registered.eos_token_ids == registered.end_of_turn_token_ids == (2,)
    text = "the harbour, 3 of <|im_start|>the 12 boats\n\n  were in."
    first, second = TokenizerBundle.load(base), TokenizerBundle.load(tmp_path / "again")
    assert second.encode(text).ids == first.encode(text).ids
    assert second.chat_template == TEMPLATE
    distance = relative(logits(tmp_path / "again"), logits(base))
    assert distance < (1e-3 if form == "F16" else BOUNDS[form])
    check = made.check
    assert check.difference < (1e-4 if form == "F16" else BOUNDS[form])
    assert check.bound == BOUNDS[form]
    if form == "F16":
        assert check.num_equal_greedy_tokens == check.num_greedy_tokens == 64
    else:
        assert check.difference > 0
        assert 0 < check.num_equal_greedy_tokens <= check.num_greedy_tokens


def test_no_token_is_added_where_every_row_of_the_embedding_has_one(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """A tokenizer without `<|endoftext|>`, GPT-2's unknown token, which transformers adds to any byte-level one."""
    base = model_folder(tiny_model(vocab_size=len(TOKENS)), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (base / name).read_text()
        (base / name).write_text(text.replace("<|endoftext|>", "<|begin|>"))
    made = exported(base, tmp_path / "out")
    assert made.warnings == ()
    register_source(GgufSource(path=made.files[0][1]), tmp_path / "again", scratch=tmp_path / "scratch")
    first, second = TokenizerBundle.load(base), TokenizerBundle.load(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    texts = {*stored["model"]["vocab"], *(one["content"] for one in stored["added_tokens"])}
    assert texts == {*TOKENS, "<|begin|>"} - {"<|endoftext|>"}
    text = "the <|endoftext|> of<|im_start|><|begin|>"
    assert second.encode(text).ids == first.encode(text).ids


def test_the_file_says_what_llama_cpp_reads(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path / "out", "Q8_0")
    reader = GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    read = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 7,
        "llama.block_count": 2,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.context_length": 256,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 270,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }.items() <= read.items()
    unused = [f"[PAD{number}]" for number in range(len(TOKENS), 270)]
    assert read["tokenizer.ggml.tokens"] == [*TOKENS, *unused]
    assert read["tokenizer.ggml.token_type"] == [
        *[TokenType.CONTROL] * 3,
        *[TokenType.NORMAL] * (len(TOKENS) - 3),
        *[TokenType.UNUSED] * len(unused),
    ]
    assert read["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied


def written_ends(path: Path) -> list[int | None]:
    fields = GGUFReader(path).fields
    names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return [fields[name].contents() if name in fields else None for name in names]


@pytest.mark.parametrize(
    ("taught", "own", "expected", "further"),
    [
        ((), 2, [2, None, None], []),
        ((0, 2), 2, [2, 0, None], []),
        ((1,), [2, 0], [2, 1, 0], []),
        ((1, 40), [0, 2], [2, 1, 40], ["<|endoftext|>"]),
    ],
)
def test_a_file_ends_answers_where_they_were_taught_to_end(
    base: Path,
    tmp_path: Path,
    taught: tuple[int, ...],
    own: Any,
    expected: list[int | None],
    further: list[str],
) -> None:
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": own}))
    source = ExportSource(model=base, adapter=None, form="F16", title="tiny", stop_token_ids=taught)
    made = export_files(source, tmp_path / "out")
    ((_, path),) = made.files
    assert written_ends(path) == expected
    assert [one for one in made.warnings if "end at" in one] == [
        f"answers end at {token!r} too, for which a GGUF file has no place: it names three ends of an answer; a "
        "program that reads it must be told to stop there"
        for token in further
    ]
    registered = register_source(GgufSource(path=path), tmp_path / "again", scratch=tmp_path / "scratch")
    assert registered.eos_token_ids == tuple(sorted(one for one in expected if one is not None))
    assert eos_token_ids(load_model(tmp_path / "again")) == {one for one in expected if one is not None}


def test_a_file_whose_ends_are_no_tokens_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(writer: Any, _: int) -> None:
        writer.add_string("tokenizer.ggml.eot_token_id", "<|im_end|>")

    monkeypatch.setattr(gguf.GGUFWriter, "add_eot_token_id", lie)
    source = ExportSource(model=base, adapter=None, form="F16", title="tiny", stop_token_ids=(0,))
    ((_, path),) = export_files(source, tmp_path / "out").files
    with pytest.raises(
        InvalidArgument, match=r"eot_token_id .* must be a token's id, got a value of kind 8"
    ) as caught:
        register_source(GgufSource(path=path), tmp_path / "again", scratch=tmp_path / "scratch")
    assert caught.value.reason == Reason.MODEL_INVALID


def test_an_end_that_is_no_token_of_the_model_is_told_and_not_handed_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(writer: Any, _: int) -> None:
        writer.add_uint32("tokenizer.ggml.eot_token_id", 0xFFFFFFFF)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 1)

    monkeypatch.setattr(gguf.GGUFWriter, "add_eot_token_id", lie)
    source = ExportSource(model=base, adapter=None, form="F16", title="tiny", stop_token_ids=(0,))
    ((_, path),) = export_files(source, tmp_path / "out").files
    registered = register_source(GgufSource(path=path), tmp_path / "again", scratch=tmp_path / "scratch")
    assert registered.eos_token_ids == (1, 2)
    assert any("the model names [4294967295]" in one for one in registered.warnings)
    settings = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 2]


def test_rows_that_are_no_whole_blocks_stay_in_16_bits_and_that_is_said(base: Path, tmp_path: Path) -> None:
    made = exported(base, tmp_path / "out", "Q8_0")
    assert "2 matrices are in 16 bits, not in 8: their rows are no multiples of 32 weights" in made.warnings
    reader = GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    assert {one.tensor_type.name for one in reader.tensors if "ffn_down" in one.name} == {"F16"}


def test_an_adapter_is_added_in_float32_and_rounded_to_the_form_alone(base: Path, tmp_path: Path) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", LoraSpec(rank=4, alpha=8))
    (adapter / "chat_template.jinja").write_text("taught {{ messages }}")
    made = exported(base, tmp_path / "out", "F16", adapter)
    assert made.check.effect > 0.05
    assert made.check.difference < made.check.effect / 50
    assert made.check.unrounded_difference < 1e-4
    reader = GGUFReader(tmp_path / "out" / "model-f16.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == "taught {{ messages }}"


@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_is_written_on_the_numbers_that_it_was_trained_beside(
    base: Path, tmp_path: Path, precision: Precision
) -> None:
    adapter = adapter_folder(base, tmp_path / "adapter", LoraSpec(rank=4, alpha=8))
    source = ExportSource(model=base, adapter=adapter, form="F16", title="tiny", precision=precision)
    made = export_files(source, tmp_path / "out")
    on_held = exported(held_in(base, tmp_path / "held", precision), tmp_path / "on-held", "F16", adapter)
    assert made.files[0][1].read_bytes() == on_held.files[0][1].read_bytes()
    assert made.check.base_difference > on_held.check.base_difference == 0
    assert f"was trained beside a base in {precision}" in made.warnings[0]


def test_equal_models_give_equal_bytes(base: Path, tmp_path: Path) -> None:
    one, other = (exported(base, tmp_path / name, "Q8_0").files[0][1].read_bytes() for name in "ab")
    assert one == other


def test_a_beginning_of_sequence_is_written_where_texts_begin_with_it(base: Path, tmp_path: Path) -> None:
    stored = json.loads((base / "tokenizer.json").read_text())
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(stored))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|endoftext|>"}))
    exported(base, tmp_path / "out")
    fields = GGUFReader(tmp_path / "out" / "model-f16.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 0


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_how_texts_are_cut_has_llama_cpps_name(tiny_model: ModelMaker, tmp_path: Path, name: str) -> None:
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    base = model_folder(tiny_model(vocab_size=270), tmp_path / "base", pre_tokenizer=cut)
    made = exported(base, tmp_path / "out")
    assert made.warnings == ()  # transformers, too, cuts so by that name
    fields = GGUFReader(tmp_path / "out" / "model-f16.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name


def test_where_transformers_cuts_otherwise_than_the_file_says_it_is_told(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Of smollm it knows nothing, and does not part digits."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    cut = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    base = model_folder(tiny_model(vocab_size=270), tmp_path / "base", pre_tokenizer=cut)
    stored = json.loads((base / "tokenizer.json").read_text())
    stored["model"]["vocab"]["12"] = 262
    stored["model"]["merges"].append(["1", "2"])
    (base / "tokenizer.json").write_text(json.dumps(stored))
    (warning,) = exported(base, tmp_path / "out").warnings
    assert "it does not cut texts as smollm does; llama.cpp is told to" in warning


def test_a_file_that_holds_something_else_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with queries and keys in the order of another architecture."""
    monkeypatch.setattr(gguf_files, "_interleaved", lambda weight, _: weight)
    with pytest.raises(FailedPrecondition, match=r"the logits of model-f16.gguf must differ") as caught:
        exported(base, tmp_path / "out")
    assert caught.value.reason == Reason.WEIGHTS_DIFFER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, f"one of {', '.join(EXPORTABLE)}, got 'GemmaForCausalLM'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "the rope type must be default, got 'llama3'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "the rope type must be default, got 'linear'",
        ),
        ({"attention_bias": True}, "attention_bias must be false, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "at least the 256 tokens of the context",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "head_dim": 16}, "head_dim must be 8"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "head_dim must be 128, got 8"),
    ],
)
def test_a_model_that_gguf_cannot_hold_is_refused_before_its_weights_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(exporting, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(InvalidArgument) as caught:
        exported(base, tmp_path / "out")
    assert message in caught.value.message
    assert caught.value.reason == Reason.EXPORT_NOT_POSSIBLE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            "a byte-level BPE, got WordLevel",
        ),
        ({"pre_tokenizer": None}, "must be a byte-level BPE that puts no space before texts"),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "puts no space before texts",
        ),
        (
            {"normalizer": {"type": "Lowercase"}},
            "cuts texts as gpt-2, smollm, gpt-4o, llama-bpe, qwen2, tekken do",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stored = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(stored | changes))
    with pytest.raises(InvalidArgument) as caught:
        exported(base, tmp_path / "out")
    assert message in caught.value.message
    assert caught.value.reason == Reason.EXPORT_NOT_POSSIBLE


def test_a_weight_beyond_16_bits_is_refused(tiny_model: ModelMaker, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=270)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    base = model_folder(model, tmp_path / "base")
    with pytest.raises(
        InvalidArgument, match=r"every weight of blk.0.ffn_up.weight must be at most 65504"
    ) as caught:
        exported(base, tmp_path / "out")
    assert caught.value.reason == Reason.EXPORT_NOT_POSSIBLE


def test_transformers_alone_reads_the_file(base: Path, tmp_path: Path) -> None:
    exported(base, tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-f16.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        assert relative(model(IDS).logits, logits(base)) < 1e-4


def test_every_architecture_that_can_be_exported_has_a_name_in_gguf() -> None:
    assert set(gguf_files._ARCHITECTURES) == set(EXPORTABLE)
    assert set(gguf_files._ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
