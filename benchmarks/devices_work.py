"""A training without services: a random model and rows in files, and a desk of this process. For `devices.py`.

As a program, `devices_work.py FOLDER THREADS`, it is the bare recipe: it makes the steps of FOLDER with nobody to tell
and writes a line, the number of the step, whenever one has ended.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.grading.outcomes import GradingError
from luthier.lm.load import load_model
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.jobs.rules import resolved
from luthier.training.recipe_settings import batch_settings, schedule_of
from luthier.training.recipes import sft
from luthier.training.recipes.batches import count_steps
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.weights import Adapter
from luthier.training.worker.order import RenderingRows, TrainOrder
from luthier.training.worker.rows import read_corpus
from luthier.v1 import fine_tuning_job_pb2, model_pb2, rendering_pb2
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.work.events import Severity
from luthier.work.row_file import write_rows
from luthier.worker.v1 import task_pb2, worker_service_pb2

RENDERING = "projects/bench/renderings/rows"
_WORDS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much work a step is.

    Attributes:
        width: of the model's hidden states.
        layers: of the model.
        row_tokens: tokens of each row; a forward pass takes four rows, a step four passes.
        steps: optimiser steps.
    """

    width: int
    layers: int
    row_tokens: int
    steps: int


class Work:
    """The files of a training in a folder, made once."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.size = size
        config = LlamaConfig(
            vocab_size=_WORDS,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 32,
            num_key_value_heads=size.width // 64,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(7)
            LlamaForCausalLM(config).save_pretrained(self.model)
        self._files = {_digest(path): path for path in sorted(self.model.iterdir())}

    def order(self, scratch: Path, ranks: int = 1, checkpoint_interval: int = 1000) -> TrainOrder:
        """Return the whole training with a scratch folder of its own, which is made."""
        scratch.mkdir(parents=True)
        job = resolved(
            fine_tuning_job_pb2.FineTuningJob(
                base_model="projects/bench/models/random",
                rendering=RENDERING,
                lora=fine_tuning_job_pb2.LoraConfig(rank=16),
                hyperparameters=fine_tuning_job_pb2.Hyperparameters(
                    batch_rows=16, micro_batch_tokens=4 * self.size.row_tokens, learning_rate=1e-4
                ),
                checkpoint_interval_steps=checkpoint_interval,
                ranks=fine_tuning_job_pb2.RankRange(min_ranks=ranks, max_ranks=ranks),
            )
        )
        files = [
            model_pb2.ModelFile(path=path.name, sha256=digest, size_bytes=path.stat().st_size)
            for digest, path in self._files.items()
        ]
        spec = task_pb2.TrainSpec(job=job, base_model_files=files, base_model_digest="b" * 64)
        return TrainOrder(
            task=task_pb2.Task(task="bench", subject="a training", train=spec),
            scratch=scratch,
            renderings=(self._rows(scratch / "rows-0"),),
        )

    def path_of(self, sha256: str) -> Path:
        """Return the model's file with a digest."""
        return self._files[sha256]

    def _rows(self, path: Path) -> RenderingRows:
        draw, count, length = random.Random(0), 16 * self.size.steps, self.size.row_tokens
        columns = {
            "row": list(range(count)),
            "split": ["TRAIN"] * count,
            "input_ids": [[draw.randrange(3, _WORDS) for _ in range(length)] for _ in range(count)],
            "loss_mask": [[place > 0 for place in range(length)] for _ in range(count)],
        }
        sink = pyarrow.BufferOutputStream()
        batch = pyarrow.RecordBatch.from_pydict(columns)
        with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        write_rows(path, [sink.getvalue().to_pybytes()])
        tokens = rendering_pb2.LengthStatistics(count=count, sum=count * length, maximum=length)
        rendering = rendering_pb2.Rendering(
            name=RENDERING,
            split_statistics=[rendering_pb2.RenderingSplitStatistics(split=SPLIT_TRAIN, tokens=tokens)],
        )
        return RenderingRows(path=path, rendering=rendering)


@dataclass(slots=True, kw_only=True)
class LocalDesk:
    """A task's context and its desk at once, for a training that nobody else wants; it notes when steps ended.

    Attributes:
        work: whose files are fetched.
        order: what is trained.
        kept: a folder for the last checkpoint.
        heard: called for each step.
        step_times: when the driver heard of each step.
        checkpoint: files of the last checkpoint by their names.
        checkpoint_step: its step; 0: there is none yet.
    """

    work: Work
    order: TrainOrder
    kept: Path
    heard: Callable[[], None] = lambda: None
    step_times: list[float] = field(default_factory=list)
    checkpoint: dict[str, task_pb2.BlobFile] = field(default_factory=dict)
    checkpoint_step: int = 0

    @property
    def task(self) -> task_pb2.Task:
        """As ordered."""
        return self.order.task

    @property
    def scratch(self) -> Path:
        """As ordered."""
        return self.order.scratch

    def check(self) -> None:
        """It is wanted."""

    def heed(self) -> None:
        """It is wanted."""

    def progress(self, *said: Any, **named: Any) -> None:
        """Nobody asks."""

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Nobody asks."""

    def measured(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Nobody asks."""

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Show warnings."""
        if severity != "INFO":
            print(f"{severity} at step {step}: {text}", file=sys.stderr)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note the time of a step."""
        del step, values
        self.step_times.append(time.perf_counter())
        self.heard()

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the model or of the last checkpoint."""
        known = {one.sha256: self.kept / name for name, one in self.checkpoint.items()}
        return known.get(file.sha256) or self.work.path_of(file.sha256)

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Link such a file into a folder."""
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(self.fetch(file))
        return target

    def pausing(self) -> bool:
        """It goes on."""
        return False

    def handed(self, step: int, paths: Sequence[Path]) -> list[Path]:
        """Return the paths, which are here."""
        del step
        return list(paths)

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Keep the files of a checkpoint in place of the one before."""
        del metrics
        self.kept.mkdir(exist_ok=True)
        for path in paths:
            path.replace(self.kept / path.name)
            self.checkpoint[path.name] = task_pb2.BlobFile(
                path=path.name,
                sha256=_digest(self.kept / path.name),
                size_bytes=(self.kept / path.name).stat().st_size,
            )
        self.checkpoint_step = step

    def checkpoint_stored(self, check: Callable[[], None] | None = None) -> list[task_pb2.BlobFile]:
        """Return the files of the last checkpoint, which nobody has to wait for."""
        del check
        return list(self.checkpoint.values())

    def commit_rollouts(self, step: int, path: Path) -> None:
        """There are none."""

    def scored(self, *asked: Any) -> list[float | GradingError]:
        """There is nothing to score."""
        raise AssertionError(f"no job of this benchmark has a grader, asked for {asked}")


def bare_steps(folder: Path) -> Iterator[int]:
    """Make the steps of a folder's rows and model with the recipe alone; yields the number of each that has ended."""
    order: Any = torch.load(folder / "order.pt", weights_only=False)
    corpus = read_corpus(order.renderings[0], lambda: None)
    model = load_model(folder / "model")
    insert_lora(model, LoraSpec(rank=16, alpha=32.0), seed=0)
    job = order.task.train.job
    batches = batch_settings(job)
    num_steps = count_steps(corpus.lengths("TRAIN"), batches).num_steps
    settings = Settings(
        batches=batches,
        schedule=schedule_of(job, num_steps),
        checkpoint_interval_steps=1000,
        validation_interval_steps=0,
    )
    optimiser = OptimiserSettings(weight_decay=0.0, max_grad_norm=1.0)
    engine = Engine(Adapter(model, "default", base_model="random"), optimiser, torch.device("cpu"))
    for event in sft.train(engine, corpus, settings, Course()):
        if isinstance(event, StepDone):
            yield event.step


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(int(sys.argv[2]))
    for done in bare_steps(Path(sys.argv[1])):
        print(done, flush=True)
