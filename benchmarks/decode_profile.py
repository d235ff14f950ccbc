"""Where a decode step goes on a CPU, and what share of what memory and matrix products allow it reaches.

`python benchmarks/decode_profile.py` has 64 rows of the demo's base model make one token each behind 240 tokens of
their own, as an evaluation does, and times whole steps of the engine, the pass of the model within them, and that pass
with one kind of operator left out at a time: what a kind costs is what the pass saves. Beside them stands the limit:
a step reads all weights and all keys and values once, and multiplies each weight by each row; how fast this machine
reads and multiplies is measured in the same run. It ends with one line of JSON:

    limit_share       the limit by a step of the engine: 1 is all that the machine can do
    pass_share        the limit by the pass of the model alone
    largest           kinds of operators with the seconds that they take, the largest first

`--rows`, `--context`, `--threads`; `--fast` is a smoke run on a tiny random model. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from sft_step import made_up_records
from sft_step_task import demo_model, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from luthier.kernels.program import Program
from luthier.lm import decode_program
from luthier.lm.cache import BatchCache
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.head import head_weight
from luthier.lm.load import load_model
from luthier.lm.passes import Pass, forward_together, plain_logits

KINDS = ("product", "attend", "rms_norm", "gated")
"""Operators of a program, by its methods."""
HEAD = "head"
_WARM_STEPS = 2
_REPEATS = 5
_READ_BYTES = 256 << 20
_PRODUCT_SIZE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is profiled: rows, tokens that each holds before, and steps that are timed of each kind."""

    rows: int = 64
    context: int = 240
    steps: int = 12


FAST = Work(rows=4, context=8, steps=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one step cannot do without, and how fast this machine is at it."""

    read_bytes: int
    products: int
    bytes_per_second: float
    products_per_second: float

    @property
    def seconds(self) -> float:
        """The least that a step takes: reading and multiplying at once."""
        return max(self.read_bytes / self.bytes_per_second, self.products / self.products_per_second)


class PartialProgram(Program):
    """A program that leaves some kinds of operators out: what comes of it is no answer, and takes as long."""

    left_out: ClassVar[str] = ""

    def product(self, *told: Any, **options: Any) -> None:
        """Tell it, unless it is left out."""
        self._told("product", *told, **options)

    def attend(self, *told: Any, **options: Any) -> None:
        """Tell it, unless it is left out."""
        self._told("attend", *told, **options)

    def rms_norm(self, *told: Any, **options: Any) -> None:
        """Tell it, unless it is left out."""
        self._told("rms_norm", *told, **options)

    def gated(self, *told: Any, **options: Any) -> None:
        """Tell it, unless it is left out."""
        self._told("gated", *told, **options)

    def _told(self, kind: str, *told: Any, **options: Any) -> None:
        if kind != self.left_out:
            getattr(super(), kind)(*told, **options)


@contextmanager
def without(kind: str) -> Iterator[None]:
    """Make programs without a kind of operator for the length of a block; empty: whole ones."""
    PartialProgram.left_out = kind
    module: Any = decode_program
    before, module.Program = module.Program, PartialProgram
    try:
        yield
    finally:
        module.Program = before


def engine_step_seconds(model: PreTrainedModel, work: Work) -> float:
    """Return how long a step of the engine takes in which every row makes a token."""
    engine = Engine(model)
    request = GenerationRequest(
        request_id="rows", prompts=_prompts(model, work), max_new_tokens=_WARM_STEPS + work.steps + 1
    )
    engine.submit(request)
    seconds = []
    while engine.wait(0):
        began = time.perf_counter()
        made = sum(len(event.token_ids) for event in engine.step())
        if made == work.rows:
            seconds.append(time.perf_counter() - began)
    for error in engine.take_failures().values():
        raise error
    return statistics.median(seconds[_WARM_STEPS:])


@torch.inference_mode()
def pass_seconds(model: PreTrainedModel, work: Work, kind: str = "") -> float:
    """Return how long a pass of one new token a row takes, with a kind of operator left out."""
    ids = torch.tensor(_prompts(model, work))
    length = work.context + _WARM_STEPS + work.steps
    cache = BatchCache(model.config.num_hidden_layers, length)
    places = torch.arange(work.context).expand(work.rows, -1)
    head = _no_head if kind == HEAD else plain_logits
    forward_together(model, [Pass(ids, places, cache, head=None)])
    decode_program._programs.pop(model, None)
    seconds = []
    with without("" if kind == HEAD else kind):
        for place in range(work.context, length):
            columns = torch.full((work.rows, 1), place)
            one = Pass(ids[:, :1], columns, cache, head=head)
            began = time.perf_counter()
            forward_together(model, [one])
            seconds.append(time.perf_counter() - began)
    decode_program._programs.pop(model, None)
    return statistics.median(seconds[_WARM_STEPS:])


def _no_head(model: PreTrainedModel, hidden_BE: Tensor) -> Tensor:
    del model
    return hidden_BE


def _prompts(model: PreTrainedModel, work: Work) -> tuple[tuple[int, ...], ...]:
    most = model.config.vocab_size
    return tuple(
        tuple((7919 * (row * work.context + place) + 5) % most for place in range(work.context))
        for row in range(work.rows)
    )


def limits_of(model: PreTrainedModel, work: Work) -> Limits:
    """Return what a step has to read and to multiply, with rates that are measured here."""
    config = model.config
    base: Any = model.base_model
    matrices = [one for one in base.layers.parameters() if one.dim() == 2]
    matrices.append(head_weight(model))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * size * work.rows * work.context
    return Limits(
        read_bytes=sum(one.numel() * one.element_size() for one in matrices)
        + held * matrices[0].element_size(),
        products=work.rows * sum(one.numel() for one in matrices),
        bytes_per_second=_READ_BYTES / _quickest(_reading()),
        products_per_second=_PRODUCT_SIZE**3 / _quickest(_multiplying(matrices[0].dtype)),
    )


def _reading() -> Callable[[], object]:
    read = torch.ones(_READ_BYTES // 4)
    return read.sum


def _multiplying(dtype: torch.dtype) -> Callable[[], object]:
    square = torch.ones(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=dtype)
    return lambda: square @ square


def _quickest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def summary_of(step: float, whole: float, kinds: Mapping[str, float], limits: Limits) -> dict[str, Any]:
    """Return shares of the limit, and what each kind takes: what the pass saves without it."""
    saved = {kind: max(0.0, whole - seconds) for kind, seconds in kinds.items()}
    rest = {
        "rest of the pass": max(0.0, whole - sum(saved.values())),
        "choosing tokens, Python": max(0.0, step - whole),
    }
    largest = sorted({**saved, **rest}.items(), key=lambda one: -one[1])
    return {
        "step_seconds": round(step, 5),
        "pass_seconds": round(whole, 5),
        "limit_seconds": round(limits.seconds, 5),
        "limit_share": round(limits.seconds / step, 3),
        "pass_share": round(limits.seconds / whole, 3),
        "read_gigabytes_per_second": round(limits.bytes_per_second / 1e9, 2),
        "product_gigaflops": round(2 * limits.products_per_second / 1e9, 1),
        "largest": {name: round(seconds, 5) for name, seconds in largest},
    }


def profiled(model: PreTrainedModel, work: Work) -> dict[str, Any]:
    """Time the engine's step, the pass, and the pass without each kind of operator."""
    whole = pass_seconds(model, work)
    kinds = {kind: pass_seconds(model, work, kind) for kind in (*KINDS, HEAD)}
    return summary_of(engine_step_seconds(model, work), whole, kinds, limits_of(model, work))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="Where a decode step goes, and how far it is from the limit."
    )
    parser.add_argument("--rows", type=int, default=Work().rows, help="that make a token each (default 64)")
    parser.add_argument("--context", type=int, default=Work().context, help="tokens before (default 240)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and our kernels (default 1)")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    work = FAST if arguments.fast else Work(rows=arguments.rows, context=arguments.context)
    with tempfile.TemporaryDirectory() as folder:
        made = tiny_model(Path(folder), made_up_records(8)) if arguments.fast else demo_model()
        summary = profiled(load_model(made), work)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
