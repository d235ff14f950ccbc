"""Runs of reinforcement on a tiny model: prompts of random words, and graders that are functions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.recipes import checkpoint, grpo
from luthier.training.recipes.batches import BatchSettings, count_steps, plan_digest
from luthier.training.recipes.corpus import Block, Corpus, Split
from luthier.training.recipes.course import TIMED_METRICS, CheckpointDue, Course, Selection, StepDone, Warned
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, settings_record
from luthier.training.recipes.policy import Grpo
from luthier.training.recipes.rollouts import Reward, Rollout
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.units import PROMPT, role_codes
from luthier.training.recipes.weights import Adapter, AllWeights

ModelMaker = Callable[..., PreTrainedModel]
Grader = Callable[[Rollout], Reward]
CPU = torch.device("cpu")
BATCHES = BatchSettings(
    seed=3, num_epochs=2, max_steps=0, batch_tokens=0, batch_rows=4, micro_batch_tokens=60
)
OPTIMISER = OptimiserSettings(weight_decay=0.01, max_grad_norm=1.0)
LOSS = Grpo(
    num_samples=6,
    max_new_tokens=8,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.28,
    kl_weight=0.0,
    drop_truncated=False,
    normaliser="TOKENS",
    scale_by_spread=False,
    max_grader_errors=64,
)
END = 2


def songs(rollout: Rollout) -> Reward:
    """The share of an answer's words that are low numbers."""
    return Reward(score=sum(token < 40 for token in rollout.token_ids) / len(rollout.token_ids))


class MemoryRollouts:
    """Grades with a function, and keeps what it is given."""

    stop_token_ids = frozenset({END})

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self.stored: dict[int, tuple[Rollout, ...]] = {}
        self.graded_splits: list[Split] = []

    def kept(self, step: int) -> Sequence[Rollout]:
        return self.stored.get(step, ())

    def graded(self, rollouts: Sequence[Rollout], split: Split, most_errors: int) -> list[Reward]:
        del most_errors
        self.graded_splits.append(split)
        return [self.grader(one) for one in rollouts]

    def keep(self, step: int, rollouts: Sequence[Rollout]) -> None:
        self.stored[step] = tuple(rollouts)


def prompt_corpus(count: int = 15, *, seed: int = 0) -> Corpus:
    draw, corpus = random.Random(seed), Corpus()
    for row in range(count):
        ids = [draw.randrange(3, 97) for _ in range(draw.randint(1, 8))]
        block = Block(
            rows=np.array([row]),
            units=np.array([row]),
            bounds=np.array([0, len(ids)]),
            input_ids=np.array(ids, dtype=np.int32),
            learnt=np.zeros(len(ids), dtype=bool),
            roles=role_codes([PROMPT]),
        )
        corpus.add("VALIDATION" if row % 5 == 4 else "TRAIN", block)
    corpus.expect_answers(LOSS.max_new_tokens)
    return corpus


class Run:
    """Weights of a tiny model, prompts, a method and a grader."""

    def __init__(
        self,
        model: PreTrainedModel,
        grader: Grader = songs,
        *,
        loss: Grpo = LOSS,
        kind: str = "adapter",
        selection: Selection | None = None,
        **changes: Any,
    ) -> None:
        self.loss, self.corpus, self.rollouts = loss, prompt_corpus(), MemoryRollouts(grader)
        batches = replace(BATCHES, **changes)
        num_steps = count_steps(self.corpus.lengths("TRAIN"), batches).num_steps
        self.settings = Settings(
            batches=batches,
            schedule=Schedule(peak=2e-2, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=num_steps),
            checkpoint_interval_steps=2,
            validation_interval_steps=0,
            selection=selection,
        )
        if kind == "adapter":
            insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
            self.engine = Engine(Adapter(model, "default", base_model="tiny"), OPTIMISER, CPU)
        else:
            weights = AllWeights(model)
            if loss.kl_weight:
                weights.keep_start()
            self.engine = Engine(weights, OPTIMISER, CPU)
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(self.corpus.lengths("TRAIN"), (), batches),
            settings=settings_record(self.settings, loss),
            optimiser=OPTIMISER,
            surroundings={},
        )
        self.warnings: list[Warned] = []

    def events(self, course: Course | None = None) -> Iterator[StepDone | CheckpointDue]:
        given = (self.engine, self.corpus, self.settings, self.loss, self.rollouts)
        for event in grpo.train(*given, course or Course()):
            if isinstance(event, Warned):
                self.warnings.append(event)
            else:
                yield event

    def finish(self, folder: Path | None = None, course: Course | None = None) -> list[Mapping[str, float]]:
        """Make all remaining steps; each checkpoint replaces the one before in `folder`."""
        metrics: list[Mapping[str, float]] = []
        for event in self.events(course):
            if isinstance(event, StepDone):
                metrics.append({key: one for key, one in event.metrics.items() if key not in TIMED_METRICS})
            elif folder is not None:
                checkpoint.save(folder, self.engine, event.course, self.identity)
        return metrics


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
