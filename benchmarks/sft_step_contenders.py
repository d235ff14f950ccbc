"""The contenders of `sft_step.py`, by method; run as a program, one of them in a process of its own.

`python sft_step_contenders.py TASK CONTENDER RESULT` reads a task, trains, and writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sft_step_loop import WHOLE, Adaptation, Loop, put_weights, run_loop
from sft_step_meter import Meter, peak_rss_bytes
from sft_step_peft import ADAPTER_OF_PEFT, merge_factors
from sft_step_task import ADAPTER, MAX_GRAD_NORM, WEIGHT_DECAY, Learnt, MethodName, Row, Task
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
from luthier.training.recipes.weights import Adapter, AllWeights, Weights

OURS = ("ours", "ours_eager")
DEFAULTS = "trl_defaults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        run: trains on a task, tells a meter, returns what was learnt.
        configuration: what a reader has to know to judge it.
        packages: what has to be installed.
        places: tokens that pass through the model in a task, padding included; None: real ones alone.
    """

    run: Callable[[Task, Meter], Learnt]
    configuration: str
    packages: tuple[str, ...] = ()
    places: Callable[[Task], int] | None = None

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is trained, and by whom.

    Attributes:
        what: it in words.
        contenders: by name; those of `OURS` and `DEFAULTS` are among them.
        reference: whose held-out loss the others' are compared with.
        speed_key: name of the figure that releases are compared by.
        results: name of the files of results.
    """

    what: str
    contenders: Mapping[str, Contender]
    reference: str
    speed_key: str
    results: str


def run_ours(task: Task, meter: Meter, impl: Impl) -> Learnt:
    """Train with our own recipe, as our worker runs it; returns what was learnt."""
    force_impl(impl)
    try:
        with freed_memory_kept():
            return _run_recipe(task, meter)
    finally:
        force_impl("auto")


def _run_recipe(task: Task, meter: Meter) -> Learnt:
    weights, learnt = _weights(task)
    optimiser = OptimiserSettings(weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    engine = Engine(weights, optimiser, weights.model.device)
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
        peak=task.learning_rate, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=task.num_steps
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
    return learnt


def _weights(task: Task) -> tuple[Weights, Learnt]:
    """The weights that train, and what they will have learnt."""
    model = load_model(task.model)
    if task.method == "full":
        weights = AllWeights(model)
        return weights, put_weights({name: one.detach() for name, one in weights.parameters.items()})
    load_adapter(model, task.adapter, ADAPTER)
    parameters = {name: one.detach() for name, one in adapter_parameters(model, ADAPTER).items()}
    modules = {name.rpartition(".")[0] for name in parameters}
    factors = {name: (parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]) for name in modules}
    return Adapter(model, ADAPTER, base_model=""), merge_factors(factors)


def _ours(what: str) -> dict[str, Contender]:
    configurations = {
        "auto": "our recipe: packed rows, loss at labels alone, kernels as the measured tables choose",
        "eager": "our recipe and modules with every kernel's eager reference",
    }
    impls: tuple[Impl, ...] = ("auto", "eager")
    return {
        name: Contender(run=partial(run_ours, impl=impl), configuration=f"{configurations[impl]}{what}")
        for name, impl in zip(OURS, impls, strict=True)
    }


def _trl(what: str, changes: str, variant: Variant, adaptation: Adaptation) -> Contender:
    return Contender(
        run=partial(run_trl, variant=variant, adaptation=adaptation),
        configuration=f"TRL SFTTrainer ({what}), {changes}",
        packages=("trl", "datasets", *(("peft",) if adaptation is ADAPTER_OF_PEFT else ())),
        places=partial(places, variant=variant),
    )


def _loop(loop: Loop, adaptation: Adaptation, configuration: str) -> Contender:
    packages = ("peft",) if adaptation is ADAPTER_OF_PEFT else ()
    return Contender(
        run=partial(run_loop, loop=loop, adaptation=adaptation),
        configuration=configuration,
        packages=packages,
    )


_PADDED = "defaults: 8 padded rows a pass, 2 passes a step, gradient checkpointing"
_UNCHECKED = "defaults but gradient checkpointing off"
_PACKED = (
    "packing=True (bfd, a step's rows in as many packs as ours), one pack a pass, gradient checkpointing off"
)
_PLAIN = Variant(gradient_checkpointing=False)
_PACKING = Variant(packing=True, gradient_checkpointing=False)
_PADDING_FREE = Variant(padding_free=True, gradient_checkpointing=False)


def _lora_contenders() -> dict[str, Contender]:
    what = "PEFT adapter, bf16 autocast"
    loop = (
        "transformers + PEFT in a plain loop on our packed rows: sdpa, block mask from positions, "
        "the model's own loss"
    )
    return {
        **_ours(""),
        DEFAULTS: _trl(what, _PADDED, Variant(), ADAPTER_OF_PEFT),
        "trl_no_checkpointing": _trl(what, _UNCHECKED, _PLAIN, ADAPTER_OF_PEFT),
        "trl_packing": _trl(what, _PACKED, _PACKING, ADAPTER_OF_PEFT),
        "trl_padding_free": _trl(
            what,
            "padding_free=True over sdpa (positions make the block mask), 8 rows a pass, 2 passes a step, "
            "gradient checkpointing off",
            _PADDING_FREE,
            ADAPTER_OF_PEFT,
        ),
        "peft": _loop(Loop(), ADAPTER_OF_PEFT, loop),
        "peft_compiled": _loop(
            Loop(compiled=True), ADAPTER_OF_PEFT, "the same under torch.compile(dynamic=True)"
        ),
    }


def _full_contenders() -> dict[str, Contender]:
    """All of float32 weights; peers also without bfloat16, in which torch is slow on processors that lack it."""
    bf16, fp32 = "float32 weights, bf16 autocast", "float32 throughout"
    float32 = Variant(gradient_checkpointing=False, bf16=False)
    float32_packing = Variant(packing=True, gradient_checkpointing=False, bf16=False)
    loop = "transformers in a plain loop on our packed rows: sdpa, block mask from positions, fused AdamW"
    compiled = f"{loop}, torch.compile(dynamic=True)"
    return {
        **_ours("; bf16, float32 masters of all weights"),
        DEFAULTS: _trl(bf16, _PADDED, Variant(), WHOLE),
        "trl_no_checkpointing": _trl(bf16, _UNCHECKED, _PLAIN, WHOLE),
        "trl_packing": _trl(bf16, _PACKED, _PACKING, WHOLE),
        "trl_float32": _trl(fp32, _UNCHECKED, float32, WHOLE),
        "trl_packing_float32": _trl(fp32, _PACKED, float32_packing, WHOLE),
        "plain": _loop(Loop(autocast=True, fused=True), WHOLE, f"{loop}; {bf16}"),
        "plain_float32": _loop(Loop(fused=True), WHOLE, f"{loop}; {fp32}"),
        "compiled": _loop(Loop(compiled=True, autocast=True, fused=True), WHOLE, f"{compiled}; {bf16}"),
        "compiled_float32": _loop(Loop(compiled=True, fused=True), WHOLE, f"{compiled}; {fp32}"),
    }


METHODS: dict[MethodName, Method] = {
    "lora": Method(
        what="LoRA",
        contenders=_lora_contenders(),
        reference="peft",
        speed_key="tps_vs_best_peer",
        results="sft_step",
    ),
    "full": Method(
        what="full",
        contenders=_full_contenders(),
        reference="plain_float32",
        speed_key="full_vs_best_peer",
        results="full_step",
    ),
}


@torch.inference_mode()
def heldout_loss(task: Task, learnt: Learnt) -> float:
    """Mean loss over the learnt tokens of the held-out rows of a float32 model that has learnt something.

    One evaluator for all, so that what differs is what was learnt.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, local_files_only=True)
    learnt(model)
    sums = [_row_loss(model, row) for row in task.heldout]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _row_loss(model: Any, row: Row) -> tuple[float, int]:
    logits_TV: Tensor = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
    labels_T = torch.tensor(row.labels[1:])
    total = nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    return total.item(), int(labels_T.ne(-100).sum())


def measure(task: Task, name: str, *, profiling: bool, evaluating: bool) -> dict[str, Any]:
    """Train one contender in this process and return what was measured."""
    contender = METHODS[task.method].contenders[name]
    vocab_size = int(read_config(task.model)["vocab_size"])
    meter = Meter(profiling=profiling, vocab_size=vocab_size)
    learnt = contender.run(task, meter)
    rss = peak_rss_bytes()
    tokens = sum(task.step_tokens())
    return {
        "step_seconds": meter.step_seconds(),
        "step_tokens": task.step_tokens(),
        "losses": meter.losses,
        "peak_rss_bytes": rss,
        "places_per_token": contender.places(task) / tokens if contender.places else 1.0,
        "threads": torch.get_num_threads(),
        "heldout_loss": heldout_loss(task, learnt) if evaluating else None,
        "costs": asdict(meter.costs) if meter.costs else None,
    }


def main() -> int:
    """Run one contender."""
    parser = argparse.ArgumentParser(description="Train one contender.")
    parser.add_argument("task", type=Path)
    parser.add_argument("contender", help="one of the task's method")
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
