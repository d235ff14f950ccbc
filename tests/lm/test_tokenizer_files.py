"""A registered model's tokens are those of its tokenizer.json, for us and for whoever downloads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from luthier.errors import InvalidArgument
from luthier.lm import tokenizer_files
from luthier.lm.probe_texts import probe_texts
from luthier.lm.register import register_source
from luthier.lm.sources import DirectorySource, RegisteredFiles
from luthier.text import tokenizer
from luthier.text.tokenizer import TokenizerBundle

ModelMaker = Callable[..., Any]
CORPUS = ["the model reads numbers such as 1234 and 5678, and spaces  and\n\nlines"] * 4
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_end|>"]
DIGITS_BY_THREE = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_level(bos: str | None = None, eos: str | None = None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS_BY_THREE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    around = [("<|bos|>", core.token_to_id("<|bos|>")), ("<|eos|>", core.token_to_id("<|eos|>"))]
    if bos or eos:
        single = " ".join(part for part in (bos, "$A", eos) if part)
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return core


def metaspace() -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


class Source:
    """A model's folder that is written as its authors would."""

    def __init__(self, maker: ModelMaker, folder: Path) -> None:
        self.maker = maker
        self.folder = folder
        self.out = folder.parent / "out"

    def write(self, core: Tokenizer, family: str = "llama", rows: int | None = None, **config: Any) -> None:
        size = core.get_vocab_size(with_added_tokens=True) if rows is None else rows
        self.maker(family, vocab_size=size).save_pretrained(self.folder)
        core.save(str(self.folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>", **config}
        (self.folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def register(self) -> RegisteredFiles:
        shutil.rmtree(self.out, ignore_errors=True)
        scratch = self.folder.parent / "scratch"
        return register_source(DirectorySource(path=self.folder), self.out, scratch=scratch)

    def refusal(self) -> str:
        with pytest.raises(InvalidArgument) as caught:
            self.register()
        assert caught.value.reason == "MODEL_INVALID"
        return caught.value.message

    def check_tokens(self) -> None:
        """Compare bundle and transformers with the file as it came, around texts and within."""
        kept = (self.folder / "tokenizer.json").read_bytes()
        assert (self.out / "tokenizer.json").read_bytes() == kept
        reference = Tokenizer.from_buffer(kept)
        bundle, theirs = TokenizerBundle.load(self.out), AutoTokenizer.from_pretrained(self.out)
        assert len(theirs) == reference.get_vocab_size(with_added_tokens=True)
        for text in (*probe_texts(SPECIAL), "9876543210 words  and\n\n\n spaces <|eos|>"):
            plain = tuple(reference.encode(text, add_special_tokens=False).ids)
            whole = tuple(reference.encode(text).ids)
            assert bundle.encode(text).ids == plain
            assert (*bundle.prefix_ids, *plain, *bundle.suffix_ids) == whole
            assert tuple(theirs(text)["input_ids"]) == whole


@pytest.fixture
def source(tiny_model: ModelMaker, tmp_path: Path) -> Source:
    return Source(tiny_model, tmp_path / "source")


FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
CLASSES = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
    None,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("made", [byte_level, metaspace])
def test_the_tokens_are_those_of_the_file_whatever_its_class(
    source: Source, made: Callable[[], Tokenizer], tokenizer_class: str | None, family: str
) -> None:
    source.write(made(), family, tokenizer_class=tokenizer_class)
    source.register()
    source.check_tokens()


def test_a_class_that_would_give_other_tokens_is_named_in_a_warning(source: Source) -> None:
    source.write(byte_level("<|bos|>"), "qwen2", tokenizer_class="LlamaTokenizerFast", bos_token="<|bos|>")
    oracle = AutoTokenizer.from_pretrained(source.folder)
    assert "<|endoftext|>" in oracle.get_vocab()  # what is invented for the folder as it came
    made = source.register()
    source.check_tokens()
    (warning,) = made.warnings
    assert "the token '<|endoftext|>' has id" in warning
    assert "PreTrainedTokenizerFast.from_pretrained" in warning


def test_a_class_that_reads_the_file_is_kept_and_no_warning_is_given(source: Source) -> None:
    source.write(byte_level("<|bos|>"), "llama", bos_token="<|bos|>", model_input_names=["input_ids"])
    assert source.register().warnings == ()
    settings = json.loads((source.out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids"]
    assert "trust_remote_code" not in settings


def test_chat_template_and_special_tokens_are_kept(source: Source) -> None:
    named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    source.write(byte_level(), "qwen2", chat_template=named, bos_token="<|bos|>", eos_token="<|im_end|>")
    made = source.register()
    assert made.has_chat_template
    assert any("left out: tool_use" in warning for warning in made.warnings)
    theirs = AutoTokenizer.from_pretrained(source.out)
    assert theirs.chat_template == TEMPLATE
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|im_end|>")
    assert "token_type_ids" not in theirs("a")
    asked = [{"role": "user", "content": "the 123"}]
    kept = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    wanted = kept.encode("the 123<|im_end|>", add_special_tokens=False).ids
    assert theirs.apply_chat_template(asked, return_dict=False) == wanted


@pytest.mark.parametrize("named", [True, False])
def test_the_post_processor_decides_and_a_configuration_against_it_is_named(
    source: Source, named: bool
) -> None:
    adds = not named
    source.write(byte_level("<|bos|>" if adds else None), add_bos_token=named, bos_token="<|bos|>")
    (warning,) = source.register().warnings
    assert f"says add_bos_token {named}" in warning
    source.check_tokens()
    assert bool(TokenizerBundle.load(source.out).prefix_ids) == adds
    settings = json.loads((source.out / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is adds  # for transformers 4, which goes by it


def test_an_end_of_sequence_after_each_text_is_kept(source: Source) -> None:
    source.write(byte_level("<|bos|>", "<|eos|>"), bos_token="<|bos|>")
    source.register()
    source.check_tokens()


def test_what_cannot_be_kept_around_texts_is_refused(source: Source) -> None:
    source.write(byte_level("<|bos|>", "<|eos|>"), bos_token="<|bos|>", eos_token="<|im_end|>")
    assert "must write nothing after a text but its end-of-sequence token" in source.refusal()
    core = byte_level()
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 10_000)]
    )
    source.write(core)
    assert "must write tokens of the embedding" in source.refusal()


def without_a_merge(stored: dict[str, Any]) -> None:
    """The same tokens of the same ids, and one that no text gives any more."""
    stored["model"]["merges"].pop(0)


def with_two_ids_changed(stored: dict[str, Any]) -> None:
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (without_a_merge, r".+ gives \[.*\], by the file \["),
        (with_two_ids_changed, r"the token 'a' has id \d+, in the file \d+"),
    ],
)
def test_a_model_is_refused_that_transformers_gives_other_tokens_whatever_is_configured(
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    changed: Callable[[dict[str, Any]], None],
    difference: str,
) -> None:
    """A version of transformers that reads another tokenizer under each configuration, the surest one too."""
    source.write(byte_level())
    other = source.folder.parent / "other"
    shutil.copytree(source.folder, other)
    stored = json.loads((other / "tokenizer.json").read_text())
    changed(stored)
    (other / "tokenizer.json").write_text(json.dumps(stored))
    read: list[Path] = []

    def open_other(path: Path, **options: str) -> Any:
        read.append(path)
        return open_converted(other, **options)

    open_converted = tokenizer_files.open_converted
    monkeypatch.setattr(tokenizer_files, "open_converted", open_other)
    message = source.refusal()
    said = f"the tokens must be those of tokenizer.json, transformers gives others: {difference}"
    assert re.match(said, message, re.DOTALL), message
    assert read.count(source.out) == 3, "each configuration was tried"
    monkeypatch.undo()
    source.register()
    source.check_tokens()


@pytest.mark.parametrize("single", ["$A $A", "<|bos|> $A <|bos|> $A"])
def test_a_post_processor_that_changes_texts_themselves_is_refused(source: Source, single: str) -> None:
    """It writes each text twice, also where nothing is to be added."""
    core = byte_level()
    around = [("<|bos|>", core.token_to_id("<|bos|>"))]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    source.write(core, bos_token="<|bos|>")
    assert re.match(r"the tokens must be those of tokenizer\.json: .+ gives \[", source.refusal(), re.DOTALL)


def test_a_post_processor_that_is_not_the_same_around_every_text_is_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would look of which a single text says nothing: what is kept of it is nothing."""
    source.write(byte_level("<|bos|>"), bos_token="<|bos|>")
    monkeypatch.setattr(tokenizer, "_surrounding_ids", lambda *_: ((), ()))
    said = r"the post-processor must write the same before and after every text: .+ gives \[.*\], not \["
    assert re.match(said, source.refusal(), re.DOTALL)
    monkeypatch.undo()
    source.register()


def test_tokens_beyond_the_embedding_are_refused(source: Source) -> None:
    core = byte_level()
    first = core.get_vocab_size(with_added_tokens=True)
    core.add_tokens([AddedToken("<extra_1>"), AddedToken("<extra_2>")])
    source.write(core, rows=first)
    said = source.refusal()
    assert f"which has {first}: 2 have none, the first is '<extra_1>' with id {first}" in said
    source.write(core, rows=first + 2)
    source.register()
    source.check_tokens()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pad_token": "[PAD]"}, "pad_token '[PAD]' is not"),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, "eos_token '</s>' is not"),
        ({"additional_special_tokens": ["<|tool|>"]}, "additional_special_tokens '<|tool|>' is not"),
        ({"added_tokens_decoder": {"9": {"content": "<new>"}}}, "added_tokens_decoder '<new>' is not"),
        ({"eos_token": {"lstrip": False}}, "eos_token \"{'lstrip': False}\" is not"),
        ({"pad_token": 5000}, "pad_token '5000' is not"),
        ({"processor_class": "\ud800"}, "tokenizer_config.json must be Unicode text"),
        ({"chat_template": "\ud800"}, "the chat template must be Unicode text, character 0"),
        ({"unk_token": "the"}, "unk_token 'the' is none: a text that writes it would be cut"),
    ],
)
def test_special_tokens_that_the_file_has_not_are_refused(
    source: Source, config: dict[str, Any], said: str
) -> None:
    source.write(byte_level(), **config)
    assert said in source.refusal()


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": 5, "extra_special_tokens": None},
        {"added_tokens_decoder": [1], "model_input_names": 7},
        {"tokenizer_class": 3, "padding_side": "left"},
        {"chat_template": [1, {"name": 5}], "auto_map": {"AutoTokenizer": ["x.Y", None]}},
        {"init_inputs": [1, 2], "tokenizer_file": "/etc/hostname", "vocab_file": "/etc/hostname"},
    ],
)
def test_a_configuration_that_is_odd_gives_the_tokens_of_the_file(
    source: Source, config: dict[str, Any]
) -> None:
    source.write(byte_level(), **config)
    source.register()
    source.check_tokens()


def test_a_tokenizer_that_panics_on_a_text_is_refused(source: Source) -> None:
    core = byte_level()
    # More ways than the regular expression library tries: it gives up, and the tokenizers library panics.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(\w+\s?)+[^\w\s]{5}"), "isolated")
    source.write(core)
    assert "tokenizer.json must stand every text" in source.refusal()


def test_a_tokenizer_file_that_is_none_is_refused_unquoted(source: Source) -> None:
    source.write(byte_level())
    (source.folder / "tokenizer.json").write_text('{"key": "lk_secret"}')
    said = source.refusal()
    assert "tokenizer.json must be a tokenizer" in said
    assert "lk_secret" not in said
    source.write(byte_level())
    (source.folder / "tokenizer_config.json").write_text("lk_secret")
    assert source.refusal() == "tokenizer_config.json must be JSON, got Expecting value at line 1"


def test_a_tokenizer_without_the_file_is_converted_and_compared(source: Source) -> None:
    core = byte_level()
    size = core.get_vocab_size(with_added_tokens=False)
    source.write(core, "qwen2", rows=size + 1, tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>")
    (source.folder / "tokenizer.json").unlink()
    core.model.save(str(source.folder))
    theirs = AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
    assert source.register().eos_token_ids == (2, size)
    kept, bundle = AutoTokenizer.from_pretrained(source.out), TokenizerBundle.load(source.out)
    for text in probe_texts(["<|endoftext|>"]):
        assert kept(text)["input_ids"] == theirs(text)["input_ids"] == list(bundle.encode(text).ids)
    theirs.save_pretrained(source.folder.parent / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (source.out / name).read_bytes() == (source.folder.parent / "saved" / name).read_bytes()


def test_a_sentencepiece_model_alone_is_refused_with_what_to_do(source: Source) -> None:
    """What transformers makes of one drops a space at a text's beginning: measured, tokens would differ in silence."""
    source.write(byte_level())
    (source.folder / "tokenizer.json").unlink()
    (source.folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(
        InvalidArgument, match=r"must come as tokenizer\.json, got tokenizer\.model alone"
    ) as caught:
        source.register()
    assert caught.value.reason == "MODEL_INVALID"
    assert "take a revision of the model that has a tokenizer.json, or make one" in caught.value.message
