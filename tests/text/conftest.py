"""A small real tokenizer, and chat templates of the shapes that models have."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from luthier.text.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, TokenizerBundle

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
DATED = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|im_start|>system\nToday is " + date_string + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}"""
STRICT_ORDER = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
TOOLS = """{%- if tools %}{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{%- if loop.index0 > 90 %}{% break %}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# Earlier assistant turns lose their thoughts once another turn follows.
FORGETFUL = """{%- for message in messages %}{%- set text = message.content %}
{%- if message.role == 'assistant' and not loop.last %}{%- set text = text.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>' + message.role + '\n' + text + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# Earlier turns lose their thoughts, the last one gets a block for them; the eos stands behind the last turn only.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{- text + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
END_LAST = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>\n' + m.content }}"
    "{% if loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '[' + m.role + ']\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>\n' }}{% endif %}"
)
# No special token but bos and eos, and a space where the answer begins.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen2.5 does: arguments by tojson.
CALLS = """{%- if tools %}{{- '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role }}{% if m.content %}{{- '\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}
{{- '\n{"name": "' + c.function.name + '", "arguments": ' }}{{- c.function.arguments | tojson }}{{- '}' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "dated": DATED,
    "strict-order": STRICT_ORDER,
    "tools": TOOLS,
}


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = ["the user asks and the assistant answers in a few words"] * 4


def train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_metaspace(scheme: str) -> tokenizers.Tokenizer:
    """A tokenizer of SentencePiece's kind: a space is part of the word behind it, and one is put in front.

    `scheme`: "prepend" by a normalizer, as Llama 2 has it; else the scheme of the pre-tokenizer.
    """
    bytes_of_all = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        steps_back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps_back, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps_back = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)]
        tokenizer.decoder = decoders.Sequence(steps_back)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", *SPECIAL],
        show_progress=False,
        initial_alphabet=list("abc: \u2581"),
    )
    tokenizer.train_from_iterator([*CORPUS, "answers: the words\n"] * 4, trainer)
    stored = json.loads(tokenizer.to_str())
    vocabulary = stored["model"]["vocab"]
    for token in bytes_of_all:
        vocabulary.setdefault(token, len(vocabulary))
    return tokenizers.Tokenizer.from_str(json.dumps(stored))


def train_prefixed() -> tokenizers.Tokenizer:
    """A byte-level tokenizer that puts a space in front of every text."""
    tokenizer = train_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def train_wordpiece() -> tokenizers.Tokenizer:
    """A tokenizer that marks what goes on inside a word, so that a word's rest cannot stand alone."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_fused() -> tokenizers.Tokenizer:
    """A tokenizer that makes one token of all unknown characters that follow each other."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZER_JSON = train_tokenizer().to_str().encode()
KINDS = {
    "byte-level": TOKENIZER_JSON,
    "prefixed": train_prefixed().to_str().encode(),
    "prepend": train_metaspace("prepend").to_str().encode(),
    "metaspace-always": train_metaspace("always").to_str().encode(),
    "metaspace-first": train_metaspace("first").to_str().encode(),
    "fused": train_fused().to_str().encode(),
    "wordpiece": train_wordpiece().to_str().encode(),
}


def with_post_processor(post_processor: object, **config: object) -> TokenizerBundle:
    """The tokenizer with a post-processor of its file, as `tokenizer(text)` of transformers goes by."""
    stored = {**json.loads(TOKENIZER_JSON), "post_processor": post_processor}
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", **config}
    return TokenizerBundle(
        {TOKENIZER_FILE: json.dumps(stored).encode(), CONFIG_FILE: json.dumps(settings).encode()}
    )


def template_processing(*pieces: str) -> dict[str, object]:
    """A post-processor of the tokenizers library that writes special tokens around "$A"."""
    tokenizer = tokenizers.Tokenizer.from_str(TOKENIZER_JSON.decode())
    special = {piece: tokenizer.token_to_id(piece) for piece in pieces if piece != "$A"}
    parts: list[object] = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "$A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": {
            piece: {"id": piece, "ids": [number], "tokens": [piece]} for piece, number in special.items()
        },
    }


def make_bundle(template: str | None, kind: str = "byte-level", **config: object) -> TokenizerBundle:
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **config}
    files = {TOKENIZER_FILE: KINDS[kind], CONFIG_FILE: json.dumps(settings).encode()}
    if template is not None:
        files[TEMPLATE_FILE] = template.encode()
    return TokenizerBundle(files)


@pytest.fixture
def bundle() -> TokenizerBundle:
    return make_bundle(CHATML)
