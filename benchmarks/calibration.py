"""What plans say of memory and time against real runs, each in a process of its own.

`python benchmarks/calibration.py` trains a small random model in several ways and ends with one line of JSON:
`plan_memory_error` and `plan_time_error`, the largest of all configurations, and `full_memory_ratio`, what a pass takes
whose layers keep their input alone by what it takes whose layers keep all. Memory is the most that the process held
above what its libraries take (VmHWM), time that of the processor for a step after the first one, so that others who
use the machine do not count; the rates of products and of memory are measured in the same process before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_speed import measured_speed
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.memory import freed_memory_kept, give_back, peak_bytes, resident_bytes, watch_peak
from luthier.lm.model_config import read_config
from luthier.lm.rehearsal import rehearse
from luthier.lm.shape import shape_of
from luthier.training.fitting import fit_of, rows_of, trained_of, work_of
from luthier.training.jobs.rules import resolved
from luthier.training.recipe_settings import (
    batch_settings,
    kept_of,
    precision_of,
    schedule_of,
    states_of,
)
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import count_steps
from luthier.training.recipes.corpus import Block, Corpus
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.footprint import Speed, seconds
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.units import CHOSEN, REJECTED, role_codes
from luthier.training.recipes.weights import Adapter, AllWeights
from luthier.training.worker.methods import loss_of, steps_of
from luthier.v1.base_precision_pb2 import BasePrecision
from luthier.v1.fine_tuning_job_pb2 import (
    ActivationCheckpointing,
    FineTuningJob,
    FullConfig,
    Hyperparameters,
    LoraConfig,
    OptimiserStates,
    PreferenceConfig,
)

VOCABULARY = 2048
STEPS = 3
PASS_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One way of training: an adapter or all weights, on pairs or not, rows of one length, what layers keep.

    `precision` is what an adapter's base is held in, `states` what the optimiser's moments are.
    """

    name: str
    is_whole: bool = False
    is_preference: bool = False
    row_tokens: int = 64
    kept: str = "NONE"
    precision: str = "BFLOAT16"
    states: str = "FLOAT32"


CONFIGURATIONS = (
    Configuration(name="adapter, short rows"),
    Configuration(name="adapter, long rows", row_tokens=1024),
    Configuration(name="adapter, long rows, SELECTIVE", row_tokens=1024, kept="SELECTIVE"),
    Configuration(name="adapter, long rows, FULL", row_tokens=1024, kept="FULL"),
    Configuration(name="adapter, pairs", is_preference=True, row_tokens=128),
    Configuration(name="all weights, short rows", is_whole=True),
    Configuration(name="all weights, long rows, FULL", is_whole=True, row_tokens=1024, kept="FULL"),
    Configuration(name="adapter beside INT8, FULL", row_tokens=1024, kept="FULL", precision="INT8"),
    Configuration(name="adapter beside NF4, short rows", precision="NF4"),
    Configuration(name="all weights, moments of 8 bits", is_whole=True, states="INT8"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run took, and what was expected of it: bytes without libraries, seconds of a step."""

    name: str
    memory: int
    expected_memory: int
    seconds: float
    expected_seconds: float
    runtime: int
    operations: float
    bytes: float

    @property
    def memory_error(self) -> float:
        """The share of what it took that the expectation is off by."""
        return abs(self.expected_memory - self.memory) / self.memory

    @property
    def time_error(self) -> float:
        """The same of time."""
        return abs(self.expected_seconds - self.seconds) / self.seconds


def make_model(folder: Path, *, hidden: int = 256, layers: int = 12) -> None:
    """Write a random model, by default of 12 layers and 10 million weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def measured(configuration: Configuration, model: Path) -> Found:
    """Return what a run took in a process of its own."""
    ended = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asdict(configuration)), "--model", str(model)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{configuration.name} ended with code {ended.returncode}: {ended.stderr[-2000:]}")
    return Found(**json.loads(ended.stdout.splitlines()[-1]))


def run_here(configuration: Configuration, folder: Path) -> Found:
    """Train in this very process, which has done nothing else."""
    torch.set_num_threads(1)
    rehearse()
    speed = measured_speed()
    with tempfile.TemporaryDirectory() as scratch:
        # What the first step of all imports and the kernels' tables are libraries, too.
        make_model(Path(scratch) / "small", hidden=32, layers=1)
        _trained(replace(configuration, row_tokens=32), Path(scratch) / "small", Path(scratch))
    device = torch.device("cpu")
    give_back(device)
    watch_peak(device)
    runtime = resident_bytes()
    with freed_memory_kept(), tempfile.TemporaryDirectory() as scratch:
        spent = _trained(configuration, folder, Path(scratch))
    memory = peak_bytes(device) - runtime
    expected_memory, expected_seconds = expected(configuration, folder, speed)
    return Found(
        name=configuration.name,
        memory=memory,
        expected_memory=expected_memory,
        seconds=spent,
        expected_seconds=expected_seconds,
        runtime=runtime,
        operations=speed.operations,
        bytes=speed.bytes,
    )


def _trained(configuration: Configuration, folder: Path, scratch: Path) -> float:
    """Return the processor's seconds of a step; a checkpoint is taken at the end."""
    job, corpus = job_of(configuration), corpus_of(configuration)
    model = load_model(folder, precision=precision_of(job.base_precision))
    optimiser = OptimiserSettings(
        weight_decay=0.0, max_grad_norm=1.0, states=states_of(job.hyperparameters.optimiser_states)
    )
    if configuration.is_whole:
        engine = Engine(AllWeights(model), optimiser, model.device)
    else:
        insert_lora(model, LoraSpec(rank=job.lora.rank, alpha=job.lora.alpha), seed=1)
        weights = Adapter(model, "default", base_model="m")
        engine = Engine(weights, optimiser, model.device)
    checkpoint_layers(model, kept_of(job.hyperparameters.activation_checkpointing))
    batches = batch_settings(job)
    settings = Settings(
        batches=batches,
        schedule=schedule_of(job, STEPS),
        checkpoint_interval_steps=STEPS,
        validation_interval_steps=0,
    )
    ends = [time.process_time()]
    identity = checkpoint.RunIdentity(
        plan_digest="",
        settings={},
        optimiser=optimiser,
        surroundings={},
    )
    for event in steps_of(loss_of(job), engine, corpus, settings, Course(), lambda: None):
        if isinstance(event, StepDone):
            ends.append(time.process_time())
        else:
            checkpoint.save(scratch / "last", engine, Course(step=STEPS), identity)
    return (ends[-1] - ends[1]) / (STEPS - 1)


def expected(configuration: Configuration, folder: Path, speed: Speed) -> tuple[int, float]:
    """Return what a plan says of memory, without libraries, and of a step's time."""
    job, corpus = job_of(configuration), corpus_of(configuration)
    trained = trained_of(job, shape_of(read_config(folder)))
    lengths = corpus.lengths("TRAIN")
    totals = count_steps(lengths, batch_settings(job))
    longest = configuration.row_tokens * (2 if configuration.is_preference else 1)
    rows = rows_of(job, totals, longest, sum(lengths.num_tokens))
    kept = kept_of(job.hyperparameters.activation_checkpointing)
    fit = fit_of(trained, rows, PASS_TOKENS, kept, "CPU", 0)
    spent = seconds(trained, work_of(job, totals), kept, speed) / totals.num_steps
    return fit.footprint.peak - fit.footprint.runtime, spent


def job_of(configuration: Configuration) -> FineTuningJob:
    """Return the job, all its defaults filled in."""
    job = FineTuningJob(
        base_model="projects/p/models/m",
        rendering="projects/p/renderings/r",
        hyperparameters=Hyperparameters(
            batch_tokens=PASS_TOKENS,
            micro_batch_tokens=PASS_TOKENS,
            num_epochs=1,
            activation_checkpointing=ActivationCheckpointing.Value(
                f"ACTIVATION_CHECKPOINTING_{configuration.kept}"
            ),
            optimiser_states=OptimiserStates.Value(f"OPTIMISER_STATES_{configuration.states}"),
        ),
    )
    if configuration.is_whole:
        job.full.CopyFrom(FullConfig())
    else:
        job.lora.CopyFrom(LoraConfig(rank=16))
        job.base_precision = BasePrecision.Value(f"BASE_PRECISION_{configuration.precision}")
    if configuration.is_preference:
        job.preference.CopyFrom(PreferenceConfig())
    return resolved(job)


def corpus_of(configuration: Configuration) -> Corpus:
    """Return rows of one length, three quarters of each learnt, enough for the steps."""
    corpus, draw = Corpus(), np.random.default_rng(3)
    count, length = STEPS * PASS_TOKENS // configuration.row_tokens, configuration.row_tokens
    roles = [CHOSEN, REJECTED] if configuration.is_preference else [""]
    for first in range(0, count, len(roles)):
        ids = draw.integers(0, VOCABULARY, size=length * len(roles)).astype(np.int32)
        one = np.arange(length) >= length // 4
        corpus.add(
            "TRAIN",
            Block(
                rows=np.arange(first, first + len(roles)),
                units=np.full(len(roles), first),
                bounds=np.arange(len(roles) + 1) * length,
                input_ids=ids,
                learnt=np.concatenate([one] * len(roles)),
                roles=role_codes(roles),
            ),
        )
    return corpus


def summary_of(found: list[Found]) -> dict[str, float]:
    """Return the largest errors, and what keeping nothing but inputs leaves of a pass."""
    by_name = {one.name: one for one in found}
    long = "adapter, long rows"
    return {
        "plan_memory_error": max(one.memory_error for one in found),
        "plan_time_error": max(one.time_error for one in found),
        "full_memory_ratio": by_name[f"{long}, FULL"].memory / by_name[long].memory,
        "full_time_ratio": by_name[f"{long}, FULL"].seconds / by_name[long].seconds,
        "selective_memory_ratio": by_name[f"{long}, SELECTIVE"].memory / by_name[long].memory,
        "selective_time_ratio": by_name[f"{long}, SELECTIVE"].seconds / by_name[long].seconds,
    }


_HEAD = f"{'':32} {'MiB':>7} {'plan':>7} {'error':>6} {'s/step':>7} {'plan':>7} {'error':>6} {'GOP/s':>6} {'GB/s':>5}"


def _line(one: Found) -> str:
    mib = 1 << 20
    return (
        f"{one.name:32} {one.memory / mib:7.1f} {one.expected_memory / mib:7.1f} {one.memory_error:6.1%} "
        f"{one.seconds:7.3f} {one.expected_seconds:7.3f} {one.time_error:6.1%} "
        f"{one.operations / 1e9:6.1f} {one.bytes / 1e9:5.1f}"
    )


def main() -> None:
    """Measure all, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="configurations whose names hold this; no summary")
    arguments = parser.parse_args()
    if arguments.child:
        found_here = run_here(Configuration(**json.loads(arguments.child)), arguments.model)
        print(json.dumps(asdict(found_here)))
        return
    found: list[Found] = []
    print(_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for configuration in (one for one in CONFIGURATIONS if arguments.only in one.name):
            found.append(measured(configuration, Path(folder)))
            print(_line(found[-1]), flush=True)
    if not arguments.only:
        print(json.dumps(summary_of(found)))


if __name__ == "__main__":
    main()
