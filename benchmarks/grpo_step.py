"""One GRPO step with an adapter on a CPU: ours against TRL's GRPOTrainer, same prompts, samples and lengths.

`python benchmarks/grpo_step.py` makes the same optimiser steps with every contender: answers of 48 tokens, 8 to each of
8 prompts, drawn at temperature 1, rewarded by a function, one update. The contenders take turns, each in a process of
its own. It writes results/grpo_step.json and ends with one line of JSON: `grpo_vs_trl` is the seconds a step of TRL's
fastest setting by ours. TRL comes with the extra `bench`. `--fast` is a smoke run on a tiny random model; it writes no
results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from child_process import Measured
from sft_step import surroundings
from sft_step_meter import Meter, peak_rss_bytes
from sft_step_task import ADAPTER, LEARNING_RATE, LORA, MAX_GRAD_NORM, SEED, WEIGHT_DECAY
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_reporter import Reporter
from turns import OURS, Contender, DrawTask, child, in_turns, make_task

from luthier.lm.adapter_files import load_adapter
from luthier.lm.load import load_model
from luthier.lm.memory import freed_memory_kept
from luthier.training.recipes import grpo
from luthier.training.recipes.batches import BatchSettings
from luthier.training.recipes.corpus import Block, Corpus, Split
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.policy import Grpo
from luthier.training.recipes.rollouts import Reward, Rollout
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.units import PROMPT, role_codes
from luthier.training.recipes.weights import Adapter

RESULTS = Path(__file__).parent / "results"


def reward_of(token_ids: Sequence[int]) -> float:
    """The share of even tokens: cheap, and different for nearly all answers."""
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


class _Rewarded:
    """Rewards of our recipe; nothing is kept."""

    stop_token_ids: frozenset[int] = frozenset()

    def kept(self, step: int) -> Sequence[Rollout]:
        del step
        return ()

    def graded(self, rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        del split, most_errors
        return [Reward(score=reward_of(one.token_ids)) for one in rollouts]

    def keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        del step, rollouts


def run_ours(task: DrawTask) -> Measured:
    """Train with our own recipe, as our worker runs it."""
    meter = Meter()
    loss = Grpo(
        num_samples=task.num_samples,
        max_new_tokens=task.new_tokens,
        temperature=1.0,
        clip_low=0.2,
        clip_high=0.2,
        kl_weight=0.0,
        drop_truncated=False,
        normaliser="TOKENS",
        scale_by_spread=True,
        max_grader_errors=1,
    )
    batches = BatchSettings(
        seed=SEED,
        num_epochs=task.num_steps,
        max_steps=0,
        batch_tokens=0,
        batch_rows=len(task.prompts),
        micro_batch_tokens=task.micro_batch_tokens,
    )
    with freed_memory_kept():
        model = load_model(task.model)
        load_adapter(model, task.adapter, ADAPTER)
        optimiser = OptimiserSettings(weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
        engine = Engine(Adapter(model, ADAPTER, base_model=""), optimiser, model.device)
        settings = Settings(
            batches=batches,
            schedule=Schedule(
                peak=LEARNING_RATE, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=task.num_steps
            ),
            checkpoint_interval_steps=task.num_steps,
            validation_interval_steps=task.num_steps,
        )
        rewards = []
        meter.begin()
        for event in grpo.train(engine, _corpus(task), settings, loss, _Rewarded(), Course()):
            if isinstance(event, StepDone):
                rewards.append(event.metrics["reward_mean"])
                meter.step_done()
    return _measured(meter, rewards)


def _corpus(task: DrawTask) -> Corpus:
    corpus, lengths = Corpus(), [len(prompt) for prompt in task.prompts]
    block = Block(
        rows=np.arange(len(lengths)),
        units=np.arange(len(lengths)),
        bounds=np.cumsum([0, *lengths]),
        input_ids=np.concatenate([np.asarray(prompt, dtype=np.int32) for prompt in task.prompts]),
        learnt=np.zeros(sum(lengths), dtype=bool),
        roles=role_codes([PROMPT] * len(lengths)),
    )
    corpus.add("TRAIN", block)
    corpus.expect_answers(task.new_tokens)
    return corpus


def run_trl(task: DrawTask, *, checkpointing: bool, bf16: bool) -> Measured:
    """Train with GRPOTrainer, which generates with transformers; prompts are text, and become the same tokens."""
    trl: Any = import_module("trl")
    datasets: Any = import_module("datasets")
    peft: Any = import_module("peft")
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    texts = [tokenizer.decode(list(prompt), skip_special_tokens=False) for prompt in task.prompts]
    meter = Meter()
    rewards: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            max_steps=task.num_steps,
            per_device_train_batch_size=len(texts) * task.num_samples,
            num_generations=task.num_samples,
            max_completion_length=task.new_tokens,
            generation_kwargs={"min_new_tokens": task.new_tokens},
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=checkpointing,
            bf16=bf16,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=WEIGHT_DECAY,
            shuffle_dataset=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        trainer = trl.GRPOTrainer(
            model=base,
            reward_funcs=lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Reporter(meter, rewards, "reward")],
        )
        trainer.train()
    return _measured(meter, rewards)


def _measured(meter: Meter, rewards: Sequence[float]) -> Measured:
    return {
        "step_seconds": meter.step_seconds(),
        "rewards": list(rewards),
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def _trl(changes: str, *, checkpointing: bool, bf16: bool) -> Contender:
    return Contender(
        run=partial(run_trl, checkpointing=checkpointing, bf16=bf16),
        configuration=f"TRL GRPOTrainer (PEFT adapter, transformers generate, one pass of all answers), {changes}",
        packages=("trl", "datasets", "peft"),
    )


CONTENDERS: dict[str, Contender] = {
    OURS: Contender(
        run=run_ours, configuration="our recipe: prompts read once for all samples, packed answers, bf16"
    ),
    "trl_defaults": _trl("defaults: bf16, gradient checkpointing", checkpointing=True, bf16=True),
    "trl_no_checkpointing": _trl("bf16, gradient checkpointing off", checkpointing=False, bf16=True),
    "trl_float32": _trl("float32, gradient checkpointing off", checkpointing=False, bf16=False),
}


def summary_of(runs: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Median seconds a step after the first, and the figures that releases are compared by; None without both sides."""
    done = {name: of_name for name, of_name in runs.items() if of_name and "error" not in of_name[0]}
    seconds = {
        name: statistics.median(statistics.fmean(one["step_seconds"][1:]) for one in of_name)
        for name, of_name in done.items()
    }
    memory = {
        name: statistics.median(one["peak_rss_bytes"] for one in of_name) for name, of_name in done.items()
    }
    best = min((name for name in seconds if name != OURS), key=lambda name: seconds[name], default=None)
    known = best is not None and OURS in seconds
    return {
        "grpo_vs_trl": round(seconds[best] / seconds[OURS], 3) if known and best else None,
        "grpo_rss_vs_trl": round(memory[OURS] / memory[best], 3) if known and best else None,
        "best_setting": best,
        "step_seconds": {name: round(one, 2) for name, one in seconds.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--child"]:
        return child(given[1:], CONTENDERS)
    parser = argparse.ArgumentParser(description="Time one GRPO step with an adapter against TRL's.")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step (default 8)")
    parser.add_argument("--samples", type=int, default=8, help="answers to each (default 8)")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of each answer (default 48)")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a run, the first not timed (default 3)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(given)
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, as the first is not timed, got {arguments.steps}")
    with tempfile.TemporaryDirectory() as scratch:
        task = make_task(
            Path(scratch),
            arguments.prompts,
            model=arguments.model,
            fast=arguments.fast,
            num_samples=arguments.samples,
            new_tokens=arguments.new_tokens,
            num_steps=arguments.steps,
        )
        task.save(Path(scratch) / "task.json")
        runs = in_turns(Path(__file__), Path(scratch) / "task.json", CONTENDERS, arguments.repeats)
    summary = summary_of(runs)
    if not arguments.fast:
        work = {name: getattr(arguments, name) for name in ("prompts", "samples", "new_tokens", "steps")}
        configurations = {name: one.configuration for name, one in CONTENDERS.items()}
        document = {"machine": surroundings(), "work": work, "contenders": runs}
        document |= {"configurations": configurations, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "grpo_step.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(summary))
    return int("error" in runs[OURS][0])


if __name__ == "__main__":
    sys.exit(main())
