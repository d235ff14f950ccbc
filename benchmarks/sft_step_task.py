"""What every contender of `sft_step.py` is given and gives: a model, the rows of each step, and what was learnt."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.daemon.demo_model import MODEL_ID, fetch_demo_model
from luthier.lm.adapter_files import save_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.register import register_source
from luthier.lm.sources import GgufSource
from luthier.text.formats import detect, parse_record
from luthier.text.rendering import Renderer
from luthier.text.tokenizer import TokenizerBundle
from luthier.text.units import reference_record
from luthier.training.recipes.batches import BatchSettings, RowLength, iterate_steps

ROOT = Path(__file__).parent.parent
CACHE = Path(__file__).parent / ".cache"
ADAPTER = "default"
LORA = LoraSpec(rank=16, alpha=32)
ROWS_PER_STEP = 16
LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.0
MAX_ROW_TOKENS = 512
SEED = 0
IGNORED = -100
"""The label that transformers and TRL pass over."""

MethodName = Literal["lora", "full"]
Learnt = Callable[[Any], None]
"""Puts what a contender has learnt into a float32 model that is as the task's was."""

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A rendered record: its tokens, and which of them are learnt."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]

    @property
    def labels(self) -> list[int]:
        """The tokens to learn, `IGNORED` elsewhere."""
        return [token if flag else IGNORED for token, flag in zip(self.ids, self.supervised, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The work of one run.

    Attributes:
        model: folder with config.json, model.safetensors and the tokenizer.
        adapter: folder with the adapter that everyone begins with, in PEFT's format.
        method: what trains: the adapter, or all weights of the model, without any adapter.
        rows: to train on.
        heldout: never trained on.
        num_steps: optimiser steps; when rows run out, they come again in another order.
        micro_batch_tokens: most tokens of a packed forward pass.
    """

    model: Path
    adapter: Path
    method: MethodName
    rows: tuple[Row, ...]
    heldout: tuple[Row, ...]
    num_steps: int
    micro_batch_tokens: int

    @property
    def learning_rate(self) -> float:
        """Of every step."""
        return FULL_LEARNING_RATE if self.method == "full" else LEARNING_RATE

    @property
    def batches(self) -> BatchSettings:
        """How our own recipe puts the rows together."""
        return BatchSettings(
            seed=SEED,
            num_epochs=math.ceil(self.num_steps * ROWS_PER_STEP / len(self.rows)),
            max_steps=self.num_steps,
            batch_tokens=0,
            batch_rows=ROWS_PER_STEP,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def steps(self) -> list[list[list[Row]]]:
        """The rows of each step, by micro-batch, in the order of our own recipe."""
        lengths = [
            RowLength(row=index, num_tokens=len(row.ids), num_supervised=sum(row.supervised[1:]))
            for index, row in enumerate(self.rows)
        ]
        return [
            [[self.rows[index] for index in batch] for batch in step.micro_batches]
            for step in iterate_steps(lengths, self.batches)
        ]

    def step_tokens(self) -> list[int]:
        """Real tokens of each step."""
        return [sum(len(row.ids) for row in chain.from_iterable(step)) for step in self.steps()]

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path, num_steps: int = 0) -> Task:
        """Read a task; with `num_steps`, only so many of its steps."""
        stored = json.loads(path.read_text())
        return cls(
            model=Path(stored["model"]),
            adapter=Path(stored["adapter"]),
            method=stored["method"],
            rows=_rows_of(stored["rows"]),
            heldout=_rows_of(stored["heldout"]),
            num_steps=num_steps or stored["num_steps"],
            micro_batch_tokens=stored["micro_batch_tokens"],
        )


def _rows_of(stored: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    return tuple(Row(ids=tuple(one["ids"]), supervised=tuple(one["supervised"])) for one in stored)


def render_rows(records: Sequence[object], model: Path, wanted: int) -> tuple[Row, ...]:
    """The first `wanted` records that have at most MAX_ROW_TOKENS tokens, in the model's chat template.

    Raises:
        ValueError: there are not so many.
    """
    renderer = Renderer(TokenizerBundle.load(model), today=date(2026, 1, 1))
    kind = detect(records)
    rows: list[Row] = []
    for record in records:
        if len(rows) == wanted:
            break
        rendered = renderer.render(reference_record(parse_record(record, kind)))
        if len(rendered.input_ids) <= MAX_ROW_TOKENS:
            rows.append(Row(ids=rendered.input_ids, supervised=rendered.loss_mask))
    if len(rows) < wanted:
        raise ValueError(f"{wanted} records of at most {MAX_ROW_TOKENS} tokens are needed, got {len(rows)}")
    return tuple(rows)


def demo_model() -> Path:
    """The demo's base model as a folder, built once from its GGUF file."""
    folder = CACHE / MODEL_ID
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        gguf = fetch_demo_model(ROOT / ".demo")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            built = Path(scratch) / "model"
            register_source(GgufSource(path=gguf), built, scratch=Path(scratch) / "download")
            built.rename(folder)
    return folder


def tiny_tokenizer(folder: Path, records: Sequence[Mapping[str, str]]) -> int:
    """Write a tokenizer made of the records' own words into a folder; returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for record in records for text in record.values()), trainer)
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    wrapped.chat_template = _CHATML
    wrapped.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def tiny_model(folder: Path, records: Sequence[Mapping[str, str]]) -> Path:
    """A random model of two layers with a tokenizer made of the records' own words; a folder of both."""
    config = LlamaConfig(
        vocab_size=tiny_tokenizer(folder, records),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def fresh_adapter(model: Path, folder: Path) -> Path:
    """Write the adapter that everyone begins with, as our own recipe draws it."""
    loaded = load_model(model)
    insert_lora(loaded, LORA, seed=SEED, name=ADAPTER)
    save_adapter(loaded, ADAPTER, folder)
    return folder
