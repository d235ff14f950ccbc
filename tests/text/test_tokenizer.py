"""Tokenizer bundles: what is read from the files, and what is refused."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from tests.text.conftest import (
    CHATML,
    GENERATION,
    TOKENIZER_JSON,
    make_bundle,
    template_processing,
    with_post_processor,
)
from transformers import AutoTokenizer

from luthier.text.records import ChatRecord, CompletionRecord, Message
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, TokenizerBundle


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "must hold tokenizer.json"),
        ({TOKENIZER_FILE: b"{}"}, "is no tokenizer"),
        ({TOKENIZER_FILE: b"\xff"}, "is no tokenizer"),
        ({TOKENIZER_FILE: TOKENIZER_JSON, CONFIG_FILE: b"[]"}, "must hold a JSON object, got list"),
    ],
)
def test_files_that_are_no_bundle_are_refused(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenizerBundle(files)


def test_load_reads_a_folder(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_bytes(TOKENIZER_JSON)
    (tmp_path / TEMPLATE_FILE).write_text(CHATML)
    loaded = TokenizerBundle.load(tmp_path)
    assert loaded.chat_template == CHATML


def test_the_template_file_goes_before_the_configuration() -> None:
    assert make_bundle(GENERATION, chat_template=CHATML).chat_template == GENERATION
    assert make_bundle(None, chat_template=CHATML).chat_template == CHATML
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": CHATML}]
    assert make_bundle(None, chat_template=named).chat_template == CHATML


def test_special_tokens_are_read_as_text_or_object() -> None:
    bundle = make_bundle(None, eos_token={"content": "</s>", "special": True}, pad_token=None)
    assert bundle.special_id("eos_token") == bundle.token_id("</s>")
    assert bundle.special_id("pad_token") is None


def test_a_stored_truncation_does_not_cut_a_text() -> None:
    stored = json.loads(TOKENIZER_JSON)
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    cut = TokenizerBundle({TOKENIZER_FILE: json.dumps(stored).encode()})
    text = "the user asks and the assistant answers"
    assert cut.encode(text) == make_bundle(None).encode(text)


def test_decode_undoes_encode() -> None:
    bundle = make_bundle(None)
    text = "<|im_start|>ünï 🙂 the  end\n"
    assert bundle.decode(bundle.encode(text).ids, skip_special_tokens=False) == text
    assert bundle.decode(bundle.encode(text).ids) == text.removeprefix("<|im_start|>")


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
POST_PROCESSORS = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "bos": template_processing("<s>", "$A"),
    "bos in a sequence": {
        "type": "Sequence",
        "processors": [BYTE_LEVEL, template_processing("<|endoftext|>", "$A")],
    },
    "bos and eos": template_processing("<s>", "$A", "</s>"),
    "two before": template_processing("<|endoftext|>", "<s>", "$A"),
    "bert": {"type": "BertProcessing", "sep": ["</s>", 4], "cls": ["<s>", 3]},
    "roberta": {
        "type": "RobertaProcessing",
        "sep": ["</s>", 4],
        "cls": ["<s>", 3],
        "trim_offsets": True,
        "add_prefix_space": False,
    },
}


@pytest.mark.parametrize("switches", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_what_stands_around_a_text_is_what_transformers_writes(
    tmp_path: Path, name: str, tokenizer_class: str, switches: dict[str, bool]
) -> None:
    stored = {**json.loads(TOKENIZER_JSON), "post_processor": POST_PROCESSORS[name]}
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", **switches}
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(stored))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    bundle = TokenizerBundle.load(tmp_path)
    for text in ("the user asks", " a", "", "x\n"):
        whole = (*bundle.prefix_ids, *bundle.encode(text).ids, *bundle.suffix_ids)
        assert whole == tuple(oracle(text)["input_ids"])
    assert bool(bundle.prefix_ids) == (name not in ("none", "byte level"))


def test_a_prefix_is_written_once() -> None:
    bundle = with_post_processor(template_processing("<|endoftext|>", "<s>", "$A"))
    ids = bundle.encode("the user").ids
    renderer = Renderer(bundle, today=date(2026, 1, 2))
    assert renderer.raw("the user") == (0, 3, *ids)
    assert renderer.raw("<|endoftext|><s>the user") == (0, 3, *ids)
    assert renderer.raw("<|endoftext|>the user") == (0, 3, 0, *ids)


@pytest.mark.parametrize(
    ("template", "num_bos"),
    [("{{ bos_token }}" + CHATML, 1), (CHATML, 0), ("{{ bos_token + bos_token }}" + CHATML, 2)],
    ids=["its own", "none", "twice"],
)
@pytest.mark.parametrize("name", ["none", "bos", "bos in a sequence", "bos and eos", "two before", "roberta"])
def test_a_chat_has_the_bos_that_its_template_writes_and_no_other(
    tmp_path: Path, name: str, template: str, num_bos: int
) -> None:
    """As transformers reads a chat, whatever the post-processor writes before a plain text."""
    stored = {**json.loads(TOKENIZER_JSON), "post_processor": POST_PROCESSORS[name]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(stored))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / TEMPLATE_FILE).write_text(template)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    bundle = TokenizerBundle.load(tmp_path)
    renderer = Renderer(bundle, today=date(2026, 1, 2))
    said = (("user", "asks"), ("assistant", "answers"), ("user", "the"), ("assistant", "words"))
    record = ChatRecord(messages=tuple(Message(role=role, content=text) for role, text in said))
    turns = [{"role": role, "content": text} for role, text in said]
    whole, first, asked = (
        tuple(
            oracle.apply_chat_template(
                turns[:end], tokenize=True, add_generation_prompt=end == 3, return_dict=False
            )
        )
        for end in (4, 2, 3)
    )
    assert renderer.render(record).input_ids == renderer.answer(record).input_ids == whole
    assert [row.input_ids for row in renderer.render_turns(record)] == [first, whole]
    assert renderer.prompt(record) == renderer.conversation(turns[:3]) == asked
    assert renderer.asking(record.messages[:3]).input_ids == asked
    bos = bundle.special_id("bos_token")
    assert [ids.count(bos) for ids in (whole, first, asked)] == [num_bos] * 3
    plain = CompletionRecord(prompt="the user", completion="asks")
    assert renderer.prompt(plain) == renderer.raw("the user")
    assert (*renderer.raw("the user"), *bundle.suffix_ids) == tuple(oracle("the user")["input_ids"])


def test_a_post_processor_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="is no tokenizer"):
        with_post_processor({"type": "Invented"})
