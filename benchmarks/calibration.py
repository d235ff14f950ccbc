"""What plans say of memory and time against real runs, each in a process of its own.

`python benchmarks/calibration.py` trains a small random model in several ways and ends with one line of JSON:
`plan_memory_error` and `plan_time_error`, the largest of all configurations, `plan_told_time_error`, the same of the
time that a plan tells by the rates that it has of the instruction set, and `full_memory_ratio`, what a pass takes whose
layers keep their input alone by what it takes whose layers keep all. Memory is the most that the process held
above what its libraries take (VmHWM), time that of the processor for a step after the first one, so that others who
use the machine do not count; the rates of products and of memory are measured in the same process before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_speed import measured_speed
from kernels import TORCH_HELD
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from luthier.kernels.dispatch import Isa, available_isas, current_isa, force_isa
from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.memory import freed_memory_kept, give_back, peak_bytes, resident_bytes, watch_peak
from luthier.lm.model_config import read_config
from luthier.lm.rehearsal import rehearse
from luthier.lm.shape import shape_of
from luthier.training.fitting import fit_of, rows_of, trained_of, work_of
from luthier.training.jobs.fits import processor_speed
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
from luthier.training.recipes.footprint import Place, Speed, seconds
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.units import CHOSEN, REJECTED, role_codes
from luthier.training.recipes.weights import Adapter, AllWeights, Weights
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

STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the model and its passes are, by default of 12 layers and 10 million weights.

    Attributes:
        pass_tokens: of a pass, and of a step.
        hidden: size of the hidden states; the MLP's is three times that.
        heads: of queries, half as many of keys.
        layers: how many.
        vocabulary: tokens that there are.
    """

    pass_tokens: int = 2048
    hidden: int = 256
    heads: int = 4
    layers: int = 12
    vocabulary: int = 2048


SCALE = Scale()


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
    """What a run took, and what was expected of it: bytes without libraries, seconds of a step.

    `planned_seconds` are those that a plan says of one core of this machine; `expected_seconds` count on what this very
    process reached just before.
    """

    name: str
    memory: int
    expected_memory: int
    seconds: float
    expected_seconds: float
    planned_seconds: float
    runtime: int
    operations: float
    trained_head: float
    bytes: float

    @property
    def memory_error(self) -> float:
        """The share of what it took that the expectation is off by."""
        return abs(self.expected_memory - self.memory) / self.memory

    @property
    def time_error(self) -> float:
        """The same of time."""
        return abs(self.expected_seconds - self.seconds) / self.seconds

    @property
    def planned_time_error(self) -> float:
        """The same of time as a plan says it."""
        return abs(self.planned_seconds - self.seconds) / self.seconds


def make_model(folder: Path, scale: Scale = SCALE) -> None:
    """Write a random model in bfloat16."""
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=3 * scale.hidden,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads // 2,
        max_position_embeddings=max(2048, scale.pass_tokens),
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def measured(
    configuration: Configuration, model: Path, scale: Scale = SCALE, isa: Isa | None = None
) -> Found:
    """Return what a run took in a process of its own, held to an instruction set, torch too; None: the best one."""
    what = json.dumps({"configuration": asdict(configuration), "scale": asdict(scale)})
    held = ["--isa", isa] if isa else []
    ended = subprocess.run(
        [sys.executable, __file__, "--child", what, "--model", str(model), *held],
        env=os.environ | (TORCH_HELD[isa] if isa else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{configuration.name} ended with code {ended.returncode}: {ended.stderr[-2000:]}")
    return Found(**json.loads(ended.stdout.splitlines()[-1]))


def run_here(configuration: Configuration, folder: Path, scale: Scale) -> Found:
    """Train in this very process, which has done nothing else, on one thread."""
    job_of(configuration, scale)  # What cannot be is refused before seconds of measuring.
    torch.set_num_threads(1)
    rehearse()
    speed, device = measured_speed(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        # What the first step of all imports and the kernels' tables are libraries, too.
        tiny = replace(scale, hidden=32, layers=1)
        make_model(Path(scratch) / "small", tiny)
        trained(replace(configuration, row_tokens=32), Path(scratch) / "small", device, tiny)
    give_back(device)
    watch_peak(device)
    runtime = resident_bytes()
    with freed_memory_kept():
        spent = trained(configuration, folder, device, scale)
    memory = peak_bytes(device) - runtime
    expected_memory, expected_seconds = expected(configuration, folder, speed, scale)
    _, planned_seconds = expected(configuration, folder, processor_speed(current_isa(), 1), scale)
    return Found(
        name=configuration.name,
        memory=memory,
        expected_memory=expected_memory,
        seconds=spent,
        expected_seconds=expected_seconds,
        planned_seconds=planned_seconds,
        runtime=runtime,
        operations=speed.operations,
        trained_head=speed.trained_head,
        bytes=speed.bytes,
    )


def trained(configuration: Configuration, folder: Path, device: torch.device, scale: Scale) -> float:
    """Train on a device and take a checkpoint at the end; returns the seconds of a step but the first.

    They are the processor's own time, or on a GPU those until it has done its work.
    """
    job, corpus = job_of(configuration, scale), corpus_of(configuration, scale)
    model = load_model(folder, device=device, precision=precision_of(job.base_precision))
    optimiser = OptimiserSettings(
        weight_decay=0.0, max_grad_norm=1.0, states=states_of(job.hyperparameters.optimiser_states)
    )
    weights: Weights = AllWeights(model) if configuration.is_whole else _adapter(model, job)
    engine = Engine(weights, optimiser, model.device)
    checkpoint_layers(model, kept_of(job.hyperparameters.activation_checkpointing))
    settings = Settings(
        batches=batch_settings(job),
        schedule=schedule_of(job, STEPS),
        checkpoint_interval_steps=STEPS,
        validation_interval_steps=0,
    )
    identity = checkpoint.RunIdentity(plan_digest="", settings={}, optimiser=optimiser, surroundings={})
    ends = [_now(device)]
    with tempfile.TemporaryDirectory() as scratch:
        for event in steps_of(loss_of(job), engine, corpus, settings, Course(), lambda: None):
            if isinstance(event, StepDone):
                ends.append(_now(device))
            else:
                checkpoint.save(Path(scratch) / "last", engine, Course(step=STEPS), identity)
    return (ends[-1] - ends[1]) / (STEPS - 1)


def _adapter(model: PreTrainedModel, job: FineTuningJob) -> Adapter:
    insert_lora(model, LoraSpec(rank=job.lora.rank, alpha=job.lora.alpha), seed=1)
    return Adapter(model, "default", base_model="m")


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def expected(
    configuration: Configuration, folder: Path, speed: Speed, scale: Scale = SCALE, place: Place = "CPU"
) -> tuple[int, float]:
    """Return what a plan says of memory, without libraries, and of a step's time."""
    job, corpus = job_of(configuration, scale), corpus_of(configuration, scale)
    what = trained_of(job, shape_of(read_config(folder)))
    lengths = corpus.lengths("TRAIN")
    totals = count_steps(lengths, batch_settings(job))
    longest = configuration.row_tokens * (2 if configuration.is_preference else 1)
    rows = rows_of(job, totals, longest, sum(lengths.num_tokens))
    kept = kept_of(job.hyperparameters.activation_checkpointing)
    fit = fit_of(what, rows, scale.pass_tokens, kept, place, 0)
    spent = seconds(what, work_of(job, totals), kept, speed) / totals.num_steps
    return fit.footprint.peak - fit.footprint.runtime, spent


def job_of(configuration: Configuration, scale: Scale = SCALE) -> FineTuningJob:
    """Return the job, all its defaults filled in."""
    job = FineTuningJob(
        base_model="projects/p/models/m",
        rendering="projects/p/renderings/r",
        hyperparameters=Hyperparameters(
            batch_tokens=scale.pass_tokens,
            micro_batch_tokens=scale.pass_tokens,
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


def corpus_of(configuration: Configuration, scale: Scale = SCALE) -> Corpus:
    """Return rows of one length, three quarters of each learnt, enough for the steps."""
    corpus, draw = Corpus(), np.random.default_rng(3)
    count, length = STEPS * scale.pass_tokens // configuration.row_tokens, configuration.row_tokens
    roles = [CHOSEN, REJECTED] if configuration.is_preference else [""]
    for first in range(0, count, len(roles)):
        ids = draw.integers(0, scale.vocabulary, size=length * len(roles)).astype(np.int32)
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


def largest_errors(found: Sequence[Found]) -> dict[str, float]:
    """Return the largest of what plans were off by."""
    return {
        "plan_memory_error": max(one.memory_error for one in found),
        "plan_time_error": max(one.time_error for one in found),
        "plan_told_time_error": max(one.planned_time_error for one in found),
    }


def summary_of(found: Sequence[Found]) -> dict[str, float]:
    """Return the largest errors, and what keeping nothing but inputs leaves of a pass."""
    by_name = {one.name: one for one in found}
    long = "adapter, long rows"
    return {
        **largest_errors(found),
        "full_memory_ratio": by_name[f"{long}, FULL"].memory / by_name[long].memory,
        "full_time_ratio": by_name[f"{long}, FULL"].seconds / by_name[long].seconds,
        "selective_memory_ratio": by_name[f"{long}, SELECTIVE"].memory / by_name[long].memory,
        "selective_time_ratio": by_name[f"{long}, SELECTIVE"].seconds / by_name[long].seconds,
    }


_HEAD = (
    f"{'':32} {'MiB':>7} {'plan':>7} {'error':>6} {'s/step':>7} {'rates':>7} {'error':>6} {'plan':>7} {'error':>6} "
    f"{'GOP/s':>6} {'head':>6} {'GB/s':>5}"
)


def _line(one: Found) -> str:
    mib = 1 << 20
    return (
        f"{one.name:32} {one.memory / mib:7.1f} {one.expected_memory / mib:7.1f} {one.memory_error:6.1%} "
        f"{one.seconds:7.3f} {one.expected_seconds:7.3f} {one.time_error:6.1%} "
        f"{one.planned_seconds:7.3f} {one.planned_time_error:6.1%} "
        f"{one.operations / 1e9:6.1f} {one.trained_head / 1e9:6.1f} {one.bytes / 1e9:5.1f}"
    )


def main() -> None:
    """Measure all, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--isa", choices=available_isas(), help="the instruction set, torch held to it")
    parser.add_argument("--only", default="", help="configurations whose names hold this; no summary")
    arguments = parser.parse_args()
    if arguments.child:
        force_isa(arguments.isa)
        what = json.loads(arguments.child)
        configuration, scale = Configuration(**what["configuration"]), Scale(**what["scale"])
        found_here = run_here(configuration, arguments.model, scale)
        print(json.dumps(asdict(found_here)))
        return
    found: list[Found] = []
    print(_HEAD)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for configuration in (one for one in CONFIGURATIONS if arguments.only in one.name):
            found.append(measured(configuration, Path(folder), isa=arguments.isa))
            print(_line(found[-1]), flush=True)
    if not arguments.only:
        print(json.dumps(summary_of(found)))


if __name__ == "__main__":
    main()
