"""The contenders of `preference_step.py`; run as a program, one of them in a process of its own.

`python preference_step_contenders.py TASK CONTENDER RESULT` reads a task, trains, and writes what it measured as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sft_step_meter import Meter, peak_rss_bytes
from sft_step_task import ADAPTER, LEARNING_RATE, LORA, MAX_GRAD_NORM, SEED, WEIGHT_DECAY
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl_reporter import Reporter

from luthier.lm.adapter_files import load_adapter
from luthier.lm.load import load_model
from luthier.lm.memory import freed_memory_kept
from luthier.training.recipes import preference
from luthier.training.recipes.batches import BatchSettings, iterate_steps
from luthier.training.recipes.corpus import Block, Corpus
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.objectives import Dpo
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.units import CHOSEN, REJECTED, role_codes
from luthier.training.recipes.weights import Adapter

BETA = 0.1
OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Tokens of a prompt and of both answers to it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of both sides, each with the prompt."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTask:
    """The work of one run: DPO on pairs, each seen once.

    Attributes:
        model: folder with config.json, model.safetensors and the tokenizer.
        adapter: folder with the adapter that ours begins with; TRL draws its own, whose update is zero too.
        pairs: to train on.
        step_pairs: pairs of an optimiser step.
        micro_batch_tokens: most tokens of a packed forward pass.
    """

    model: Path
    adapter: Path
    pairs: tuple[Pair, ...]
    step_pairs: int
    micro_batch_tokens: int

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return len(self.pairs) // self.step_pairs

    @property
    def batches(self) -> BatchSettings:
        """How our recipe puts the pairs together."""
        return BatchSettings(
            seed=SEED,
            num_epochs=1,
            max_steps=0,
            batch_tokens=0,
            batch_rows=self.step_pairs,
            micro_batch_tokens=self.micro_batch_tokens,
        )

    def corpus(self) -> Corpus:
        """Two rows for each pair, the chosen one first."""
        sides = [(pair.prompt, side) for pair in self.pairs for side in (pair.chosen, pair.rejected)]
        block = Block(
            rows=np.arange(len(sides)),
            units=np.arange(len(sides)) // 2 * 2,
            bounds=np.cumsum([0, *(len(prompt) + len(side) for prompt, side in sides)]),
            input_ids=np.concatenate([np.asarray(prompt + side, dtype=np.int32) for prompt, side in sides]),
            learnt=np.concatenate([np.arange(len(prompt + side)) >= len(prompt) for prompt, side in sides]),
            roles=role_codes([CHOSEN, REJECTED] * len(self.pairs)),
        )
        corpus = Corpus()
        corpus.add("TRAIN", block)
        return corpus

    def steps(self) -> list[list[Pair]]:
        """The pairs of each step, in the order of our recipe."""
        return [
            [self.pairs[row // 2] for batch in step.micro_batches for row in batch if row % 2 == 0]
            for step in iterate_steps(self.corpus().lengths("TRAIN"), self.batches)
        ]

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> PairTask:
        """Read a task."""
        stored = json.loads(path.read_text())
        pairs = tuple(Pair(**{name: tuple(ids) for name, ids in one.items()}) for one in stored.pop("pairs"))
        return cls(
            model=Path(stored["model"]),
            adapter=Path(stored["adapter"]),
            pairs=pairs,
            step_pairs=stored["step_pairs"],
            micro_batch_tokens=stored["micro_batch_tokens"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from DPOConfig's defaults.

    Attributes:
        batch_pairs: pairs of a forward pass; the default is 8.
        gradient_checkpointing: on by default.
        bf16: on by default; off, the base is float32 and nothing is cast.
    """

    batch_pairs: int = 8
    gradient_checkpointing: bool = True
    bf16: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        run: trains on a task and tells a meter.
        configuration: what a reader has to know to judge it.
        packages: what has to be installed.
    """

    run: Callable[[PairTask, Meter], None]
    configuration: str
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def run_ours(task: PairTask, meter: Meter) -> None:
    """Train with our own recipe, as our worker runs it."""
    with freed_memory_kept():
        model = load_model(task.model)
        load_adapter(model, task.adapter, ADAPTER)
        optimiser = OptimiserSettings(weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
        engine = Engine(Adapter(model, ADAPTER, base_model=""), optimiser, model.device)
        schedule = Schedule(
            peak=LEARNING_RATE, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=task.num_steps
        )
        settings = Settings(
            batches=task.batches,
            schedule=schedule,
            checkpoint_interval_steps=task.num_steps,
            validation_interval_steps=task.num_steps,
        )
        corpus = task.corpus()
        meter.begin()
        for event in preference.train(engine, corpus, settings, Dpo(beta=BETA), Course()):
            if isinstance(event, StepDone):
                meter.losses.append(event.metrics["train_loss"])
                meter.step_done()


def run_trl(task: PairTask, meter: Meter, variant: Variant) -> None:
    """Train with DPOTrainer, the reference being the model with its adapter off."""
    trl: Any = import_module("trl")
    datasets: Any = import_module("datasets")
    peft: Any = import_module("peft")
    dtype = torch.bfloat16 if variant.bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, local_files_only=True)
    pairs = [pair for step in task.steps() for pair in step]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_steps=task.num_steps,
            per_device_train_batch_size=variant.batch_pairs,
            gradient_accumulation_steps=math.ceil(task.step_pairs / variant.batch_pairs),
            gradient_checkpointing=variant.gradient_checkpointing,
            bf16=variant.bf16,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=WEIGHT_DECAY,
            train_sampling_strategy="sequential",
            max_length=None,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        words = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        trainer = trl.DPOTrainer(
            model=base,
            args=config,
            train_dataset=words,
            processing_class=AutoTokenizer.from_pretrained(task.model, local_files_only=True),
            peft_config=peft.LoraConfig(
                r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Reporter(meter, meter.losses, "loss")],
        )
        # What its own preparation would make, of our tokens.
        trainer.train_dataset = datasets.Dataset.from_dict(
            {
                "prompt_ids": [list(pair.prompt) for pair in pairs],
                "chosen_ids": [list(pair.chosen) for pair in pairs],
                "rejected_ids": [list(pair.rejected) for pair in pairs],
            }
        )
        trainer.train()


def _trl(changes: str, variant: Variant) -> Contender:
    return Contender(
        run=partial(run_trl, variant=variant),
        configuration=f"TRL DPOTrainer (PEFT adapter, reference by adapter off), {changes}",
        packages=("trl", "datasets", "peft"),
    )


CONTENDERS: dict[str, Contender] = {
    OURS: Contender(
        run=run_ours,
        configuration="our recipe: packed pairs, log-probs at answers alone, reference by adapter off in the same step",
    ),
    "trl_defaults": _trl("defaults: bf16 autocast, 8 padded pairs a pass, gradient checkpointing", Variant()),
    "trl_no_checkpointing": _trl(
        "bf16 autocast, 8 padded pairs a pass, gradient checkpointing off",
        Variant(gradient_checkpointing=False),
    ),
    "trl_small_batches": _trl(
        "bf16 autocast, 2 padded pairs a pass, gradient checkpointing off",
        Variant(batch_pairs=2, gradient_checkpointing=False),
    ),
    "trl_float32": _trl(
        "float32 throughout, 8 padded pairs a pass, gradient checkpointing off",
        Variant(gradient_checkpointing=False, bf16=False),
    ),
    "trl_float32_small_batches": _trl(
        "float32 throughout, 2 padded pairs a pass, gradient checkpointing off",
        Variant(batch_pairs=2, gradient_checkpointing=False, bf16=False),
    ),
}


def measure(task: PairTask, name: str) -> dict[str, Any]:
    """Train one contender in this process and return what was measured."""
    meter = Meter()
    CONTENDERS[name].run(task, meter)
    return {
        "step_seconds": meter.step_seconds(),
        "step_tokens": [sum(pair.num_tokens for pair in step) for step in task.steps()],
        "losses": meter.losses[: task.num_steps],
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    """Run one contender."""
    parser = argparse.ArgumentParser(description="Train one contender.")
    parser.add_argument("task", type=Path)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    result = measure(PairTask.load(arguments.task), arguments.contender)
    arguments.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
