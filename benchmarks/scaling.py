"""What a step costs on 8 to 1,024 GPUs, replicated and sharded (fsdp2): arithmetic and a small simulation.

No measurement. `python benchmarks/scaling.py` writes results/scaling.json and results/scaling.svg, puts its tables into
docs/scaling.md, and ends with one line of JSON. The same call writes the same bytes.

Letters as in `luthier.training.recipes.footprint`; N ranks, n machines of 8, S bytes of what is exchanged.

    replicated  each rank has all weights. Once a step the gradients of what is trained are summed in float32, a ring:
                each rank sends 2 (N - 1) / N of 4 bytes for each trained weight. Nothing is computed meanwhile.
    fsdp2       each rank keeps 1 / N of weights, gradients and moments. In each pass it gathers each layer's weights
                (bfloat16) forward and again backward, the embedding and the head once, and after a layer's backward
                gives away what is not its share of the float32 gradient: 2 + 2 and 4 bytes a weight, (N - 1) / N of
                them. A layer is gathered while the one before it computes, and given away while the next one does.

    time        S (N - 1) / N over what a GPU's links within a machine carry, or S (n - 1) / n over what all links of
                a machine carry to the others, whichever is longer; a hop's latency for each machine of a ring, for
                each level of a tree where gradients are summed
    passes      a step has the same rows on any number of ranks, and so the same tokens. With more ranks than passes of
                `PASS_TOKENS` passes get smaller, down to `LEAST_PASS_TOKENS`; further ranks are idle
    efficiency  the time that the step's products would take, divided among N, over the time of the step
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import scaling_report

from luthier.lm.kept import Checkpointing
from luthier.lm.shape import ModelShape, shape_of
from luthier.training.recipes.footprint import (
    LargestPass,
    Speed,
    Trained,
    Work,
    footprint,
    seconds,
)

Sharding = Literal["replicated", "fsdp2"]
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PASS_TOKENS = 8192
LEAST_PASS_TOKENS = 1024
ROW_TOKENS = 1024
STEP_TOKENS = (131_072, 2_097_152)
RANK = 16
ENOUGH = 0.5
"""Below this efficiency more GPUs are not worth it: half of them wait."""


H100 = Speed(operations=0.4 * 989e12, trained_head=0.4 * 989e12, bytes=0.8 * 3.35e12, moves=1.5)
"""What is assumed to be reached of a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine of 8 GPUs, as its makers state it, with what is assumed to be reached of it.

    Attributes:
        name: for people.
        memory: bytes of a GPU; a tenth stays free.
        speed: of a GPU.
        inside: bytes a second that a GPU sends to those of its machine.
        outside: bytes a second that a machine sends to others, all its links together.
        hop_seconds: what a message between machines takes besides.
    """

    name: str
    memory: float = 80e9
    speed: Speed = H100
    inside: float = 0.8 * 450e9
    outside: float
    hop_seconds: float = 6e-6
    gpus: int = 8


FAST = Machine(name="8 x 400 Gb/s", outside=0.85 * 8 * 50e9)
SLOW = Machine(name="1 x 100 Gb/s", outside=0.85 * 12.5e9, hop_seconds=30e-6)
MACHINES = (FAST, SLOW)


def _llama(hidden: int, layers: int, heads: int, inner: int, vocabulary: int = 128_256) -> ModelShape:
    return shape_of(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 64 if hidden < 3072 else 128,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": hidden < 4096,
        }
    )


MODELS = {
    "1B": _llama(2048, 16, 32, 8192),
    "3B": _llama(3072, 28, 24, 8192),
    "8B": _llama(4096, 32, 32, 14336),
    "14B": _llama(5120, 40, 40, 17408, 151_936),
    "32B": _llama(5120, 64, 40, 27648, 151_936),
    "70B": _llama(8192, 80, 64, 28672),
}
"""Sizes of Llama 3 (1B, 3B, 8B, 70B) and of Qwen's of 14 and 32 billion, as if those were Llamas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, how, on how many GPUs of which machines, by steps of how many tokens."""

    model: str
    is_whole: bool
    sharding: Sharding
    machine: Machine
    num_gpus: int
    step_tokens: int

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return MODELS[self.model]

    @property
    def trained(self) -> Trained:
        """All weights, or an adapter on all linear layers."""
        ranks = RANK * self.shape.layers
        factors = ranks * sum(one.inputs + one.outputs for one in self.shape.linears)
        return Trained(
            shape=self.shape,
            is_whole=self.is_whole,
            num_factors=0 if self.is_whole else factors,
            sum_of_ranks=0 if self.is_whole else ranks * len(self.shape.linears),
            has_trained_head=self.is_whole,
        )

    @property
    def pass_tokens(self) -> int:
        """Of each pass: as large as allowed, and smaller where ranks would have none."""
        return max(LEAST_PASS_TOKENS, min(PASS_TOKENS, self.step_tokens // self.num_gpus))

    @property
    def passes_of_a_rank(self) -> int:
        """Of the one that has most."""
        return math.ceil(self.step_tokens / self.pass_tokens / self.num_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a setting comes to.

    Attributes:
        kept: what layers keep of a pass, the quickest that fits; empty: nothing fits.
        memory: bytes of a GPU.
        sent: bytes that a rank sends in a step.
        step_seconds: of a step; 0 where nothing fits.
        waiting: share of the step in which the busiest rank computes nothing.
        efficiency: see the module.
    """

    kept: str
    memory: float
    sent: float
    step_seconds: float
    waiting: float
    efficiency: float


def outcome(setting: Setting) -> Outcome:
    """Return what a setting comes to."""
    kinds: tuple[Checkpointing, ...] = ("NONE", "SELECTIVE", "FULL")
    fits = [(kept, memory_bytes(setting, kept)) for kept in kinds]
    chosen = [one for one in fits if one[1] <= 0.9 * setting.machine.memory]
    if not chosen:
        return Outcome(
            kept="",
            memory=fits[-1][1],
            sent=sent_bytes(setting),
            step_seconds=0.0,
            waiting=0.0,
            efficiency=0.0,
        )
    kept, memory = chosen[0]
    busy = setting.passes_of_a_rank * pass_seconds(setting, setting.pass_tokens, kept)
    took = step_seconds(setting, kept)
    whole = setting.step_tokens / PASS_TOKENS * pass_seconds(setting, PASS_TOKENS, kept) / setting.num_gpus
    return Outcome(
        kept=kept,
        memory=memory,
        sent=sent_bytes(setting),
        step_seconds=took,
        waiting=1 - busy / took,
        efficiency=whole / took,
    )


def memory_bytes(setting: Setting, kept: Checkpointing) -> float:
    """Return what a rank takes, as a plan counts it."""
    trained = setting.trained
    if setting.sharding == "fsdp2":
        trained = replace(trained, num_parts=setting.num_gpus)
    largest = LargestPass(num_tokens=setting.pass_tokens, num_scored=setting.pass_tokens)
    return footprint(trained, largest, kept, "GPU").peak


def layer_bytes(setting: Setting) -> float:
    """Return the bytes of one layer's weights in bfloat16, its adapters in float32 included."""
    shape, trained = setting.shape, setting.trained
    return 2 * shape.num_products / shape.layers + 4 * trained.num_factors / shape.layers


def root_bytes(setting: Setting) -> float:
    """Return those of the embedding and the head."""
    return 2.0 * setting.shape.vocabulary * setting.shape.hidden * (1 if setting.shape.is_tied else 2)


def given_bytes(setting: Setting) -> float:
    """Return the bytes of the float32 gradients of one layer."""
    shape = setting.shape
    return 4.0 * (shape.num_products if setting.is_whole else setting.trained.num_factors) / shape.layers


def sent_bytes(setting: Setting) -> float:
    """Return what a rank sends in a step."""
    share = 1 - 1 / setting.num_gpus
    if setting.sharding == "replicated":
        return 2 * share * 4 * setting.trained.num_trained
    layers = setting.shape.layers * (2 * layer_bytes(setting) + given_bytes(setting))
    root = root_bytes(setting) * (3 if setting.is_whole else 1)
    return setting.passes_of_a_rank * share * (layers + root)


def pass_seconds(setting: Setting, num_tokens: int, kept: Checkpointing) -> float:
    """Return the time of a pass's products, forward and backward."""
    work = Work(
        num_tokens=num_tokens,
        num_scored=num_tokens,
        num_seen=num_tokens * (min(ROW_TOKENS, num_tokens) + 1) // 2,
        num_steps=0,
    )
    return seconds(setting.trained, work, kept, setting.machine.speed)


def gather_seconds(setting: Setting, size: float) -> float:
    """Return what it takes until all ranks have what each had its share of, or each the sum of its share: a ring."""
    machine, N = setting.machine, setting.num_gpus
    n = N // machine.gpus
    inside = size * (1 - 1 / N) / machine.inside
    outside = size * (1 - 1 / n) / machine.outside
    return max(inside, outside) + (n - 1) * machine.hop_seconds


def sum_seconds(setting: Setting, size: float) -> float:
    """Return what it takes until all ranks have the sum of what each had: a ring's bytes, a tree's latency."""
    machine, N = setting.machine, setting.num_gpus
    n = N // machine.gpus
    inside = 2 * size * (1 - 1 / N) / machine.inside
    outside = 2 * size * (1 - 1 / n) / machine.outside
    return max(inside, outside) + 2 * math.log2(max(n, 1)) * machine.hop_seconds


def step_seconds(setting: Setting, kept: Checkpointing) -> float:
    """Return what a step takes, the update included."""
    computing = pass_seconds(setting, setting.pass_tokens, kept)
    owned = setting.trained.num_trained / (1 if setting.sharding == "replicated" else setting.num_gpus)
    update = 30 * owned / setting.machine.speed.bytes
    if setting.sharding == "replicated":
        return (
            setting.passes_of_a_rank * computing
            + sum_seconds(setting, 4.0 * setting.trained.num_trained)
            + update
        )
    return setting.passes_of_a_rank * sharded_pass_seconds(setting, computing, kept) + update


def sharded_pass_seconds(setting: Setting, computing: float, kept: Checkpointing) -> float:
    """Return what a pass takes whose layers are gathered ahead: one clock for products, one for the links.

    The links do one thing after another; a layer is computed when it is there, and gathered when the one before it
    begins to compute. Backward a layer's gradient is given away when it is made, ahead of the next gather.
    """
    layers = setting.shape.layers
    units = (2.0 if setting.is_whole else 1.0) + (1.0 if kept == "FULL" else 0.0)
    forward = computing / (1 + units) / layers
    backward = forward * units
    gather, give = (gather_seconds(setting, size) for size in (layer_bytes(setting), given_bytes(setting)))
    links = products = gather_seconds(setting, root_bytes(setting))
    for take, out in ((forward, 0.0), (backward, give)):
        begins = products
        for _ in range(layers):
            links = max(links, begins) + gather
            begins = max(products, links)
            products = begins + take
            if out:
                links = max(links, begins) + out
    # The last gradients are given away when nothing is left to compute.
    return max(products, links) + give


def settings() -> Iterator[Setting]:
    """Yield all settings."""
    ways: tuple[Sharding, ...] = ("replicated", "fsdp2")
    for machine, is_whole, step_tokens, model, sharding, num_gpus in itertools.product(
        MACHINES, (False, True), STEP_TOKENS, MODELS, ways, GPUS
    ):
        yield Setting(
            model=model,
            is_whole=is_whole,
            sharding=sharding,
            machine=machine,
            num_gpus=num_gpus,
            step_tokens=step_tokens,
        )


def rows() -> list[scaling_report.Row]:
    """Return what each setting comes to."""
    return [
        scaling_report.Row(
            machine=one.machine.name,
            trains="all weights" if one.is_whole else f"adapter, r {RANK}",
            step_tokens=one.step_tokens,
            model=one.model,
            sharding=one.sharding,
            num_gpus=one.num_gpus,
            pass_tokens=one.pass_tokens,
            **asdict(outcome(one)),
        )
        for one in settings()
    ]


def main() -> None:
    """Write the results, the picture and the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.parse_args()
    found = rows()
    (RESULTS / "scaling.json").write_text(scaling_report.as_json(found))
    (RESULTS / "scaling.svg").write_text(scaling_report.picture(found))
    PAGE.write_text(scaling_report.with_tables(PAGE.read_text(), found, ENOUGH))
    last = scaling_report.limits(found, ENOUGH)
    print(json.dumps({"rows": len(found), "scales_to": last}))


if __name__ == "__main__":
    main()
