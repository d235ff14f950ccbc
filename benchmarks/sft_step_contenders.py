"""The contenders of `sft_step.py`; run as a program, one of them in a process of its own.

`python sft_step_contenders.py TASK CONTENDER RESULT` reads a task, trains, and writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sft_step_meter import Meter, peak_rss_bytes
from sft_step_peft import Factors, run_peft
from sft_step_task import ADAPTER, LEARNING_RATE, LORA, MAX_GRAD_NORM, WEIGHT_DECAY, Row, Task
from sft_step_trl import Variant, places, run_trl
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from luthier.kernels.tables import Impl, force_impl
from luthier.lm.adapter_files import load_adapter
from luthier.lm.load import load_model
from luthier.lm.lora import adapter_parameters
from luthier.lm.memory import freed_memory_kept
from luthier.lm.model_config import read_config
from luthier.training.recipes import sft
from luthier.training.recipes.corpus import Block, Corpus
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.weights import Adapter

OURS = ("ours", "ours_eager")
REFERENCE = "peft"
"""Whose held-out loss the others' are compared with."""
DEFAULTS = "trl_defaults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        run: trains on a task, tells a meter, returns the adapter.
        configuration: what a reader has to know to judge it.
        packages: what has to be installed.
        places: tokens that pass through the model in a task, padding included; None: real ones alone.
    """

    run: Callable[[Task, Meter], Factors]
    configuration: str
    packages: tuple[str, ...] = ()
    places: Callable[[Task], int] | None = None

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def run_ours(task: Task, meter: Meter, impl: Impl) -> Factors:
    """Train with our own recipe, as our worker runs it; returns the adapter."""
    force_impl(impl)
    try:
        with freed_memory_kept():
            return _run_recipe(task, meter)
    finally:
        force_impl("auto")


def _run_recipe(task: Task, meter: Meter) -> Factors:
    model = load_model(task.model)
    load_adapter(model, task.adapter, ADAPTER)
    weights = Adapter(model, ADAPTER, base_model="")
    optimiser = OptimiserSettings(weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    engine = Engine(weights, optimiser, model.device)
    corpus = Corpus()
    numbers = np.arange(len(task.rows))
    block = Block(
        rows=numbers,
        units=numbers,
        bounds=np.cumsum([0, *(len(row.ids) for row in task.rows)]),
        input_ids=np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in task.rows]),
        learnt=np.concatenate([np.asarray(row.supervised, dtype=np.bool_) for row in task.rows]),
    )
    corpus.add("TRAIN", block)
    schedule = Schedule(
        peak=LEARNING_RATE, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=task.num_steps
    )
    settings = Settings(
        batches=task.batches,
        schedule=schedule,
        checkpoint_interval_steps=task.num_steps,
        validation_interval_steps=task.num_steps,
    )
    meter.begin()
    for event in sft.train(engine, corpus, settings, Course()):
        if isinstance(event, StepDone):
            meter.losses.append(event.metrics["train_loss"])
            meter.step_done()
    parameters = {name: one.detach() for name, one in adapter_parameters(model, ADAPTER).items()}
    modules = {name.rpartition(".")[0] for name in parameters}
    return {name: (parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]) for name in modules}


def _trl(changes: str, variant: Variant) -> Contender:
    return Contender(
        run=partial(run_trl, variant=variant),
        configuration=f"TRL SFTTrainer (PEFT adapter, bf16 autocast), {changes}",
        packages=("trl", "datasets", "peft"),
        places=partial(places, variant=variant),
    )


_PLAIN = Variant()
CONTENDERS: dict[str, Contender] = {
    "ours": Contender(
        run=partial(run_ours, impl="auto"),
        configuration="our recipe: packed rows, loss at labels alone, kernels as the measured tables choose",
    ),
    "ours_eager": Contender(
        run=partial(run_ours, impl="eager"),
        configuration="our recipe and modules with every kernel's eager reference",
    ),
    DEFAULTS: _trl("defaults: 8 padded rows a pass, 2 passes a step, gradient checkpointing", _PLAIN),
    "trl_no_checkpointing": _trl(
        "defaults but gradient checkpointing off", Variant(gradient_checkpointing=False)
    ),
    "trl_packing": _trl(
        "packing=True (bfd, a step's rows in as many packs as ours), one pack a pass, "
        "gradient checkpointing off",
        Variant(packing=True, gradient_checkpointing=False),
    ),
    "trl_padding_free": _trl(
        "padding_free=True over sdpa (positions make the block mask), 8 rows a pass, 2 passes a step, "
        "gradient checkpointing off",
        Variant(padding_free=True, gradient_checkpointing=False),
    ),
    REFERENCE: Contender(
        run=partial(run_peft, compiled=False),
        configuration="transformers + PEFT in a plain loop on our packed rows: sdpa, block mask from positions, "
        "the model's own loss",
        packages=("peft",),
    ),
    "peft_compiled": Contender(
        run=partial(run_peft, compiled=True),
        configuration="the same under torch.compile(dynamic=True)",
        packages=("peft",),
    ),
}


@torch.inference_mode()
def heldout_loss(task: Task, factors: Factors) -> float:
    """Mean loss over the learnt tokens of the held-out rows, the adapter merged into a float32 base.

    One evaluator for all, so that what differs is what was learnt.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, local_files_only=True)
    scale = LORA.alpha / LORA.rank
    for module, (a_RI, b_OR) in factors.items():
        model.get_submodule(module).weight += scale * (b_OR.float() @ a_RI.float())
    sums = [_row_loss(model, row) for row in task.heldout]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _row_loss(model: Any, row: Row) -> tuple[float, int]:
    logits_TV: Tensor = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
    labels_T = torch.tensor(row.labels[1:])
    total = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    return total.item(), int(labels_T.ne(-100).sum())


def measure(task: Task, name: str, *, profiling: bool, evaluating: bool) -> dict[str, Any]:
    """Train one contender in this process and return what was measured."""
    contender = CONTENDERS[name]
    vocab_size = int(read_config(task.model)["vocab_size"])
    meter = Meter(profiling=profiling, vocab_size=vocab_size)
    factors = contender.run(task, meter)
    rss = peak_rss_bytes()
    tokens = sum(task.step_tokens())
    return {
        "step_seconds": meter.step_seconds(),
        "step_tokens": task.step_tokens(),
        "losses": meter.losses,
        "peak_rss_bytes": rss,
        "places_per_token": contender.places(task) / tokens if contender.places else 1.0,
        "threads": torch.get_num_threads(),
        "heldout_loss": heldout_loss(task, factors) if evaluating else None,
        "costs": asdict(meter.costs) if meter.costs else None,
    }


def main() -> int:
    """Run one contender."""
    parser = argparse.ArgumentParser(description="Train one contender.")
    parser.add_argument("task", type=Path)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("result", type=Path)
    parser.add_argument("--profile", action="store_true", help="two steps, the second one profiled")
    parser.add_argument("--evaluate", action="store_true", help="also take the held-out loss")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    task = Task.load(arguments.task, num_steps=2 if arguments.profile else 0)
    result = measure(task, arguments.contender, profiling=arguments.profile, evaluating=arguments.evaluate)
    arguments.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
