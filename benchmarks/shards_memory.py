"""What each rank holds of a model that ranks divide, against one rank that has all of it, and against the plan.

`python benchmarks/shards_memory.py` trains a random model of 39 million weights for three steps and takes a
checkpoint, on one rank and divided between two, an adapter and all weights. Its last line is JSON:

    all_steps_ratio, adapter_steps_ratio    the most that a rank of two held in steps, by what one alone did; libraries
                                            are not counted
    all_peak_ratio, adapter_peak_ratio      the same with the checkpoint at the end, of which plans count nothing
    plan_error                              the largest share of what a rank held in steps that the plan was off by

The whole document is `benchmarks/results/shards_memory.json`; `--only all` measures one of them, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calibration import STEPS, Configuration, Scale, corpus_of, job_of, make_model
from torch._C._distributed_c10d import FileStore

from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.memory import freed_memory_kept, give_back, peak_bytes, resident_bytes, watch_peak
from luthier.lm.model_config import read_config
from luthier.lm.rehearsal import rehearse
from luthier.lm.shape import shape_of
from luthier.training.fitting import fit_of, rows_of, trained_of
from luthier.training.recipe_settings import batch_settings, kept_of, schedule_of
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import count_steps
from luthier.training.recipes.collective import Collective, OneRank
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.divided_weights import DividedWeights
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.process_group import Replicas
from luthier.training.recipes.shards import LARGEST_KEPT_BYTES, Division
from luthier.training.recipes.weights import Adapter, AllWeights, Weights
from luthier.training.worker.methods import loss_of, steps_of
from luthier.v1.fine_tuning_job_pb2 import SHARDING_FSDP2, FineTuningJob, RankRange

RESULTS = Path(__file__).parent / "results"
SCALE = Scale(pass_tokens=512, hidden=512, heads=8)
"""Of weights that take more than what a pass keeps: what is divided is to show."""
CONFIGURATIONS = {
    "all": Configuration(name="all", is_whole=True, row_tokens=512, kept="FULL"),
    "adapter": Configuration(name="adapter", row_tokens=512, kept="FULL"),
}
_CPU = torch.device("cpu")
_WAIT = timedelta(minutes=30)


class _Unwatched:
    def enter(self, num_bytes: int) -> None:
        """Nobody looks."""

    def leave(self) -> None:
        """Nobody looks."""


def job_on(configuration: Configuration, num_ranks: int, scale: Scale = SCALE) -> FineTuningJob:
    """Return a job of so many ranks, which divide the model where there are several."""
    job = job_of(configuration, scale)
    if num_ranks > 1:
        job.sharding = SHARDING_FSDP2
        job.ranks.CopyFrom(RankRange(min_ranks=num_ranks, max_ranks=num_ranks))
    return job


def planned(configuration: Configuration, folder: Path, num_ranks: int) -> int:
    """Return what a plan says that each rank takes, without libraries."""
    job, lengths = job_on(configuration, num_ranks), corpus_of(configuration, SCALE).lengths("TRAIN")
    what = trained_of(job, shape_of(read_config(folder)), num_ranks=num_ranks)
    totals = count_steps(lengths, batch_settings(job))
    rows = rows_of(job, totals, configuration.row_tokens, sum(lengths.num_tokens), num_ranks)
    kept = kept_of(job.hyperparameters.activation_checkpointing)
    found = fit_of(what, rows, SCALE.pass_tokens, kept, "CPU", 0).footprint
    return found.peak - found.runtime


def trained(configuration: Configuration, folder: Path, collective: Collective, scale: Scale = SCALE) -> int:
    """Make the steps on this rank, and a checkpoint; returns the most that the process held before that."""
    job = job_on(configuration, collective.num_ranks, scale)
    model: Any = load_model(folder)
    division = Division(collective=collective, device=_CPU) if collective.num_ranks > 1 else None
    optimiser = OptimiserSettings(weight_decay=0.0, max_grad_norm=1.0)
    engine = Engine(_weights(configuration, model, job, division), optimiser, _CPU, collective)
    checkpoint_layers(model, kept_of(job.hyperparameters.activation_checkpointing))
    settings = Settings(
        batches=batch_settings(job),
        schedule=schedule_of(job, STEPS),
        checkpoint_interval_steps=STEPS,
        validation_interval_steps=0,
    )
    identity = checkpoint.RunIdentity(plan_digest="", settings={}, optimiser=optimiser, surroundings={})
    corpus, peak = corpus_of(configuration, scale), 0
    with tempfile.TemporaryDirectory() as scratch:
        for event in steps_of(loss_of(job), engine, corpus, settings, Course(), lambda: None):
            if not isinstance(event, StepDone):
                peak = peak_bytes(_CPU)
                checkpoint.save(Path(scratch) / "last", engine, Course(step=STEPS), identity)
    return peak


def _weights(
    configuration: Configuration, model: Any, job: FineTuningJob, division: Division | None
) -> Weights:
    if configuration.is_whole:
        return AllWeights(model) if division is None else DividedWeights(model, division)
    insert_lora(model, LoraSpec(rank=job.lora.rank, alpha=job.lora.alpha), seed=1)
    return Adapter(model, "default", base_model="m", division=division)


def run_rank(name: str, folder: Path, rank: int, num_ranks: int) -> tuple[int, int]:
    """Be one rank; returns the most bytes that it held above what its libraries take: by its steps, and in all."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rehearse()
    configuration, tiny = CONFIGURATIONS[name], replace(SCALE, hidden=32, layers=1)
    with tempfile.TemporaryDirectory() as scratch:
        # Before ranks join: of several transformers lets only the first one write.
        make_model(Path(scratch), tiny)
        collective: Collective = OneRank()
        if num_ranks > 1:
            store = FileStore(str(folder / f"{name}-store"), num_ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=_WAIT)
            collective = Replicas(_CPU, _Unwatched(), passes_together=True)
        # What the first step of all imports, and the kernels' tables, are libraries too.
        trained(replace(configuration, row_tokens=32), Path(scratch), collective, tiny)
    give_back(_CPU)
    collective.gathered(None)
    watch_peak(_CPU)
    before = resident_bytes()
    # As a worker that trains.
    with freed_memory_kept(LARGEST_KEPT_BYTES) if num_ranks > 1 else freed_memory_kept():
        by_steps = trained(configuration, folder, collective)
    return by_steps - before, peak_bytes(_CPU) - before


def measured(name: str, folder: Path, num_ranks: int) -> dict[str, Any]:
    """Return what each of so many ranks held, in processes of their own, and what the plan says.

    Raises:
        RuntimeError: a rank has failed.
    """
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--rank",
                f"{rank}/{num_ranks}",
                "--only",
                name,
                "--model",
                str(folder),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    ends = [one.communicate() for one in ranks]
    if any(one.returncode for one in ranks):
        # Of several the one that failed first is not known: the others have lost it.
        raise RuntimeError("\n".join(f"a rank of {name} failed: {said[-2000:]}" for _, said in ends))
    held = [tuple(map(int, out.splitlines()[-1].split())) for out, _ in ends]
    plan = planned(CONFIGURATIONS[name], folder, num_ranks)
    return {
        "steps_bytes": [one for one, _ in held],
        "peak_bytes": [one for _, one in held],
        "planned_bytes": plan,
        "plan_error": round(max(abs(plan - one) / one for one, _ in held), 4),
    }


def main() -> None:
    """Measure, or be a rank that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=sorted(CONFIGURATIONS))
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank, num_ranks = map(int, arguments.rank.split("/"))
        print(*run_rank(arguments.only, arguments.model, rank, num_ranks))
        return
    document: dict[str, Any] = {}
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), SCALE)
        for name in [arguments.only] if arguments.only else CONFIGURATIONS:
            alone, both = (measured(name, Path(folder), num_ranks) for num_ranks in (1, 2))
            document[name] = {"1": alone, "2": both}
            for which in ("steps", "peak"):
                ratio = max(both[f"{which}_bytes"]) / alone[f"{which}_bytes"][0]
                summary[f"{name}_{which}_ratio"] = round(ratio, 4)
            print(f"{name}: {document[name]}", file=sys.stderr, flush=True)
    summary["plan_error"] = max(side["plan_error"] for one in document.values() for side in one.values())
    if not arguments.only:
        (RESULTS / "shards_memory.json").write_text(json.dumps({**document, **summary}, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
