"""A small real tokenizer, and chat templates of the shapes that models have."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "dated": DATED,
    "strict-order": STRICT_ORDER,
    "tools": TOOLS,
}


def train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the user asks and the assistant answers in a few words"] * 4, trainer)
    return tokenizer


TOKENIZER_JSON = train_tokenizer().to_str().encode()


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


def make_bundle(template: str | None, **config: object) -> TokenizerBundle:
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **config}
    files = {TOKENIZER_FILE: TOKENIZER_JSON, CONFIG_FILE: json.dumps(settings).encode()}
    if template is not None:
        files[TEMPLATE_FILE] = template.encode()
    return TokenizerBundle(files)


@pytest.fixture
def bundle() -> TokenizerBundle:
    return make_bundle(CHATML)
