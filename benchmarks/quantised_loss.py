"""What an adapter learns beside a base model in 8 or 4 bits, against the same beside bfloat16: held-out loss.

`python benchmarks/quantised_loss.py` trains an adapter of rank 16 for 30 steps of 16 rows of synthetic earnings news
(examples/earnings) beside each precision of each of two models, from the same adapter, on the same rows in the same
order, and ends with one line of JSON: the loss of 64 rows that were never trained on, by that beside bfloat16.

    int8_loss_ratio, nf4_loss_ratio            of SmolLM2-135M-Instruct, the demo's: it was expanded from 4 bits, which
                                               flatters whoever quantises it again
    own_int8_loss_ratio, own_nf4_loss_ratio    of a model of four layers that is trained here for it, from nothing, on
                                               other news: its weights were never quantised

The whole document is `benchmarks/results/quantised_loss.json`, with the losses before too: what nobody learnt would be
the same beside anything. `--model own` takes the second one alone (a minute of a processor), `--fast` a smoke run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sft_step_task import MAX_GRAD_NORM, ROOT, Row, demo_model, render_rows, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.precision import PRECISIONS, Precision
from luthier.lm.quantise import stored_bytes
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import Adapter, AllWeights, Weights

if TYPE_CHECKING:
    from companies import Split

RESULTS = Path(__file__).parent / "results"
_CPU = torch.device("cpu")
_SEED = 0
_RATE = 2e-4
_OWN_RATE = 1e-3
"""Of the own model's weights, before."""
_OWN_ADAPTER_RATE = 2e-3
"""Of an adapter of so small a model, which at a larger one's rate learns next to nothing in so few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is trained: steps of rows beside each precision, rows held out, and what the own model learns before."""

    steps: int = 30
    step_rows: int = 16
    heldout: int = 64
    own_steps: int = 100
    own_width: int = 192
    own_layers: int = 4


FAST = Sizes(steps=2, step_rows=4, heldout=4, own_steps=3, own_width=64, own_layers=2)


def news(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Return conversations about news: a text, and the figures in it as JSON."""
    sys.path.append(str(ROOT / "examples" / "earnings"))
    from generate import conversation, examples

    return [conversation(one) for one in examples(split, count, seed=seed)]


def batch_of(rows: Sequence[Row], *, all_tokens: bool = False) -> PackedBatch:
    """Return rows as one packed batch; with `all_tokens` all are learnt."""
    weights = [[1.0 if all_tokens or flag else 0.0 for flag in row.supervised] for row in rows]
    return pack([row.ids for row in rows], {WEIGHT: weights})


def learn(
    weights: Weights, steps: Sequence[Sequence[Row]], rate: float, *, all_tokens: bool = False
) -> Engine:
    """Make steps of rows at a rate that falls along a line; returns the engine."""
    engine = Engine(weights, OptimiserSettings(weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM), _CPU)
    for number, rows in enumerate(steps):
        batch = batch_of(rows, all_tokens=all_tokens)
        engine.accumulate(batch, FusedLoss(), supervised(_num_learnt(batch)))
        engine.update(rate * (1 - number / len(steps)))
    return engine


def _num_learnt(batch: PackedBatch) -> int:
    # The first token of a row is predicted by nothing.
    firsts = torch.tensor(batch.cu_seqlens[:-1])
    learnt = batch.streams[WEIGHT] != 0
    learnt[firsts] = False
    return int(learnt.sum())


def loss_of(engine: Engine, rows: Sequence[Row]) -> float:
    """Return the mean loss of a learnt token of rows."""
    batch = batch_of(rows)
    return engine.measure(batch, FusedLoss(), supervised(1))["train_loss"] / _num_learnt(batch)


def own_model(folder: Path, sizes: Sizes) -> Path:
    """Train a model from nothing on news as plain text, and write it as any base model is registered."""
    records = news("train", 2000, _SEED + 1)
    tokenizer = tiny_tokenizer(
        folder, [{"text": turn["content"]} for one in records for turn in one["messages"]]
    )
    config = LlamaConfig(
        vocab_size=tokenizer,
        hidden_size=sizes.own_width,
        intermediate_size=3 * sizes.own_width,
        num_hidden_layers=sizes.own_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    rows = render_rows(records, folder, len(records))
    steps = [
        [rows[(number * 16 + place) % len(rows)] for place in range(16)] for number in range(sizes.own_steps)
    ]
    weights = AllWeights(load_model(folder))
    learn(weights, steps, _OWN_RATE, all_tokens=True)
    weights.model.save_pretrained(folder)
    return folder


def compared(model: Path, sizes: Sizes, rate: float) -> dict[Precision, dict[str, float]]:
    """Return what comes of training beside each precision of a model: losses, bytes of weights."""
    rows = render_rows(
        news("train", sizes.steps * sizes.step_rows, _SEED), model, sizes.steps * sizes.step_rows
    )
    heldout = render_rows(news("test", sizes.heldout, _SEED), model, sizes.heldout)
    steps = [rows[number * sizes.step_rows : (number + 1) * sizes.step_rows] for number in range(sizes.steps)]
    found = {}
    for precision in PRECISIONS:
        loaded = load_model(model, precision=precision)
        insert_lora(loaded, LoraSpec(rank=16, alpha=32), seed=_SEED)
        adapter = Adapter(loaded, "default", base_model="base")
        settings = OptimiserSettings(weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM)
        before = loss_of(Engine(adapter, settings, _CPU), heldout)
        engine = learn(adapter, steps, rate)
        trained = {id(one) for one in adapter.parameters.values()}
        size = sum(stored_bytes(one) for one in loaded.parameters() if id(one) not in trained)
        found[precision] = {
            "loss_before": before,
            "loss": loss_of(engine, heldout),
            "weights_bytes": size,
        }
        print(f"{model.name} {precision}: {found[precision]}", file=sys.stderr, flush=True)
    return found


def ratios(found: Mapping[Precision, Mapping[str, float]], prefix: str = "") -> dict[str, float]:
    """Return the held-out loss beside each precision by that beside bfloat16."""
    plain = found["BFLOAT16"]["loss"]
    return {
        f"{prefix}{precision.lower()}_loss_ratio": round(found[precision]["loss"] / plain, 4)
        for precision in PRECISIONS
        if precision != "BFLOAT16"
    }


def main() -> None:
    """Train, write the document, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["both", "own", "demo"], default="both")
    parser.add_argument("--fast", action="store_true", help="a smoke run, of the own model alone")
    arguments = parser.parse_args()
    # Losses do not depend on it, and two threads of which one waits for its processor take ten times as long.
    torch.set_num_threads(1)
    sizes = FAST if arguments.fast else Sizes()
    document: dict[str, Any] = {}
    summary: dict[str, float] = {}
    if arguments.model != "demo" or arguments.fast:
        with tempfile.TemporaryDirectory() as folder:
            document["own"] = compared(own_model(Path(folder) / "own", sizes), sizes, _OWN_ADAPTER_RATE)
        summary |= ratios(document["own"], "own_")
    if arguments.model != "own" and not arguments.fast:
        document["demo"] = compared(demo_model(), sizes, _RATE)
        summary |= ratios(document["demo"])
    if not arguments.fast:
        path = RESULTS / "quantised_loss.json"
        # What was measured of the other model stays.
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **document, **summary}, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
