"""Ranks in processes of their own, joined by gloo, and runs of every method that they make together."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.training.recipes import prompt_runs
from tests.training.recipes.pairs import pairs, unpaired
from tests.training.recipes.test_sft import corpus_of
from torch._C._distributed_c10d import FileStore
from transformers import PreTrainedModel

from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import BatchSettings, count_steps, plan_digest
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import TIMED_METRICS, CheckpointDue, Course, Warned
from luthier.training.recipes.divided_weights import DividedWeights
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, settings_record
from luthier.training.recipes.objectives import Dpo, Ipo, Kto, Orpo, PairwiseReward, Simpo
from luthier.training.recipes.policy import Grpo
from luthier.training.recipes.process_group import Replicas
from luthier.training.recipes.reference import score_reference
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.shards import Division
from luthier.training.recipes.weights import Adapter, AllWeights, fresh_score
from luthier.training.worker.methods import Loss, is_compared, steps_of

CPU = torch.device("cpu")
OPTIMISER = OptimiserSettings(weight_decay=0.01, max_grad_norm=1.0)
BATCHES = BatchSettings(
    seed=3, num_epochs=2, max_steps=5, batch_tokens=160, batch_rows=0, micro_batch_tokens=48
)
METHODS: Mapping[str, Loss | None] = {
    "sft": None,
    "dpo": Dpo(beta=0.5, nll_weight=0.1),
    "ipo": Ipo(beta=0.5),
    "orpo": Orpo(beta=0.5),
    "simpo": Simpo(beta=2.0, gamma=0.5),
    "kto": Kto(beta=0.5),
    "reward_model": PairwiseReward(centring=0.01),
    "grpo": replace(prompt_runs.LOSS, kl_weight=0.1),
}


class NoMeetings:
    """Nobody watches."""

    def enter(self, num_bytes: int) -> None:
        """Goes on."""

    def leave(self) -> None:
        """Goes on."""


def on_ranks(
    num_ranks: int, folder: Path, work: Callable[[Collective], Any], *, passes_together: bool = False
) -> list[Any]:
    """Return what `work` returns on each of so many ranks; whatever that is can be pickled.

    They are forked, as importing takes longer than what they do; one thread each, so that there is no other to miss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    lines = [context.Pipe(duplex=False) for _ in range(num_ranks)]
    ranks = [
        context.Process(
            target=_be_rank, args=(rank, num_ranks, folder, work, sender, passes_together), daemon=True
        )
        for rank, (_, sender) in enumerate(lines)
    ]
    for rank in ranks:
        rank.start()
    try:
        for receiver, sender in lines:
            sender.close()
            assert receiver.poll(120.0), "a rank hangs"
        found = [receiver.recv() for receiver, _ in lines]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for value, error in found:
        assert not error, f"{error}\n{value}"
    return [value for value, _ in found]


def divided(num_ranks: int, folder: Path, work: Callable[[Collective], Any]) -> list[Any]:
    """Return what `work` returns on each of so many ranks that make their passes together."""
    return on_ranks(num_ranks, folder, work, passes_together=True)


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """Check that runs of a model of bfloat16 made the same steps, whose sums were rounded in another order."""
    assert len(found) == len(wanted) > 2
    for left, right in zip(found, wanted, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            # A last bit of a weight moves a sum by more than it does in float32.
            assert left[name] == pytest.approx(value, rel=1e-2, abs=2e-3), name


def _be_rank(
    rank: int,
    num_ranks: int,
    folder: Path,
    work: Callable[[Collective], Any],
    sender: Connection,
    passes_together: bool,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = FileStore(str(folder / "store"), num_ranks)
        wait = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=wait)
        sender.send((work(Replicas(CPU, NoMeetings(), passes_together=passes_together)), ""))
    except BaseException as error:
        sender.send((traceback.format_exc(), f"{type(error).__name__}: {error}"))
    finally:
        sender.close()
        # What the process shares with the one that it was forked from is that one's to end.
        os._exit(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a run came to on a rank: metrics by step, digests of the last checkpoint's files, passes that it learnt."""

    steps: list[dict[str, float]]
    digests: dict[str, str]
    rollouts: dict[int, Any]
    passes: int


def count_passes(engine: Engine) -> list[None]:
    """Return a list that grows with every pass that an engine learns from."""
    accumulate = engine.accumulate
    passes: list[None] = []

    def counted(*arguments: Any) -> dict[str, float]:
        passes.append(None)
        return accumulate(*arguments)

    vars(engine)["accumulate"] = counted
    return passes


class Run:
    """A method, an adapter or all weights of a tiny model, and rows; `rollouts` are kept ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Any],
        method: str,
        kind: str,
        rollouts: Mapping[int, Any] | None = None,
        **changes: Any,
    ) -> None:
        self.model, self.kind, self.loss = model, kind, METHODS[method]
        self.corpus = self._corpus(rows)
        batches = replace(BATCHES, **changes)
        if isinstance(self.loss, Grpo):
            batches = replace(prompt_runs.BATCHES, max_steps=3)
        num_steps = count_steps(self.corpus.lengths("TRAIN"), batches).num_steps
        self.settings = Settings(
            batches=batches,
            schedule=Schedule(peak=5e-3, course=RateCourse.COSINE, warmup_steps=2, num_steps=num_steps),
            checkpoint_interval_steps=3,
            validation_interval_steps=2,
        )
        self.rollouts = prompt_runs.MemoryRollouts(prompt_runs.songs)
        self.rollouts.stored = dict(rollouts or {})
        train, validation = self.corpus.lengths("TRAIN"), self.corpus.lengths("VALIDATION")
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(train, validation, batches),
            settings=settings_record(self.settings, self.loss),
            optimiser=OPTIMISER,
            surroundings={},
        )

    def _corpus(self, rows: list[Any]) -> Corpus:
        match self.loss:
            case None:
                return corpus_of(rows)
            case Kto():
                return unpaired(20)
            case Grpo():
                return prompt_runs.prompt_corpus()
            case _:
                return pairs(20)

    def engine(self, collective: Collective) -> Engine:
        score = fresh_score(self.model, seed=5) if isinstance(self.loss, PairwiseReward) else None
        division = Division(collective=collective, device=CPU) if collective.passes_together else None
        if self.kind == "adapter":
            insert_lora(self.model, LoraSpec(rank=4, alpha=8.0), seed=11)
            adapter = Adapter(self.model, "default", base_model="tiny", score=score, division=division)
            return Engine(adapter, OPTIMISER, CPU, collective)
        weights: AllWeights | DividedWeights = (
            AllWeights(self.model, score=score)
            if division is None
            else DividedWeights(self.model, division, score=score)
        )
        if isinstance(self.loss, Grpo):
            weights.keep_start()
        return Engine(weights, OPTIMISER, CPU, collective)

    def made(
        self, collective: Collective, folder: Path, *, begin: Path | None = None, end_step: int = 1000
    ) -> Made:
        """Make the steps after a checkpoint up to one; each checkpoint replaces the one before in `folder`."""
        engine = self.engine(collective)
        if isinstance(self.loss, Dpo | Ipo | Kto) and engine.weights.reference() is None:
            assert is_compared(self.loss)
            score_reference(engine, self.corpus, self.settings.batches.micro_batch_tokens)
        course = Course()
        if begin is not None:
            course, _ = checkpoint.load(begin, engine, self.identity)
        passes = count_passes(engine)
        steps: list[dict[str, float]] = []
        written: list[Path] = []
        for event in self._events(engine, course):
            if isinstance(event, CheckpointDue):
                written = checkpoint.save(folder, engine, event.course, self.identity)
                if event.course.step >= end_step:
                    break
            elif not isinstance(event, Warned):
                steps.append({key: one for key, one in event.metrics.items() if key not in TIMED_METRICS})
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
        return Made(steps=steps, digests=digests, rollouts=self.rollouts.stored, passes=len(passes))

    def _events(self, engine: Engine, course: Course) -> Iterator[Any]:
        return steps_of(self.loss, engine, self.corpus, self.settings, course, lambda: None, self.rollouts)
