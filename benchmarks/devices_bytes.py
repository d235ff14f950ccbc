"""What the weights of a base model take in 8 and 4 bits, by bfloat16; and what a process holds that loads it so.

`measured` is for `devices.py`. `python benchmarks/devices_bytes.py [FOLDER]` prints the same of a model's folder,
or of a random model of SmolLM2-135M's shape, as a line of JSON:

    int8_bytes_ratio, nf4_bytes_ratio    bytes of all weights, embedding and head among them, by those in bfloat16
    peak_bytes                           the most that a process held while it loaded the model and made a pass of 512
                                         tokens, forward and backward through an adapter, above what its libraries
                                         take, by precision: pages of files count, as they do where memory is limited
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.memory import peak_bytes, resident_bytes, watch_peak
from luthier.lm.packed import WEIGHT, pack
from luthier.lm.precision import PRECISIONS, Precision
from luthier.lm.quantise import stored_bytes
from luthier.lm.readouts import FusedLoss
from luthier.lm.rehearsal import rehearse
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import Adapter

_TOKENS = 512


def ratios(folder: Path) -> dict[str, Any]:
    """Return the figures of a model, each precision measured in a process of its own."""
    found = {precision: _in_a_process(folder, precision) for precision in PRECISIONS}
    plain = found["BFLOAT16"]["weights"]
    return {
        "int8_bytes_ratio": round(found["INT8"]["weights"] / plain, 4),
        "nf4_bytes_ratio": round(found["NF4"]["weights"] / plain, 4),
        "peak_bytes": {precision: one["peak"] for precision, one in found.items()},
    }


def measured(folder: Path, *, is_fast: bool) -> dict[str, Any]:
    """Return the figures of a random model, which is written into a folder; `is_fast`: of two of its layers."""
    return ratios(write_model(folder / "model", 2 if is_fast else 30, 4096 if is_fast else 49152))


def write_model(folder: Path, num_layers: int = 30, vocabulary: int = 49152) -> Path:
    """Write a random model of SmolLM2-135M's shape."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def _in_a_process(folder: Path, precision: Precision) -> dict[str, int]:
    command = [sys.executable, __file__, str(folder), precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(folder: Path, precision: Precision) -> dict[str, int]:
    """Return the bytes of the weights, and the peak above what the libraries take."""
    device = torch.device("cpu")
    rehearse()
    before = resident_bytes()
    watch_peak(device)
    model = load_model(folder, precision=precision)
    weights = sum(stored_bytes(one) for one in model.parameters())
    insert_lora(model, LoraSpec(rank=16, alpha=32), seed=0)
    settings = OptimiserSettings(weight_decay=0.0, max_grad_norm=1.0)
    engine = Engine(Adapter(model, "default", base_model="base"), settings, device)
    ids = [[3 + number % 1000 for number in range(_TOKENS)]]
    engine.accumulate(pack(ids, {WEIGHT: [[1.0] * _TOKENS]}), FusedLoss(), supervised(_TOKENS - 1))
    return {"weights": weights, "peak": peak_bytes(device) - before}


def main() -> None:
    """Measure one precision of a model, or all and print."""
    if len(sys.argv) == 3:
        precision: Any = sys.argv[2]
        print(json.dumps(_measured(Path(sys.argv[1]), precision)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) == 2 else write_model(Path(scratch) / "model")
        print(json.dumps(ratios(folder)))


if __name__ == "__main__":
    main()
