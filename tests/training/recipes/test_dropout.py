"""An adapter's dropout: of passes that learn alone, by step and row, whatever a row is packed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.pairs import pairs, unpaired
from tests.training.recipes.test_preference import BATCHES, CPU, OPTIMISER, settings_for
from tests.training.recipes.test_sft import corpus_of, timeless
from transformers import PreTrainedModel

from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import BatchSettings, iterate_steps, plan_digest
from luthier.training.recipes.course import CheckpointDue, Course, Event, StepDone, Warned
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import settings_record
from luthier.training.recipes.objectives import Dpo, Kto, PairwiseReward
from luthier.training.recipes.weights import Adapter, fresh_score
from luthier.training.worker.methods import Loss, steps_of

LOSSES = {
    "sft": None,
    "dpo": Dpo(beta=0.1),
    "kto": Kto(beta=0.2),
    "reward_model": PairwiseReward(),
}
BARELY = 1e-30
"""A learning rate that moves nothing."""
# Every row alone is a step, so that a step's loss is its row's.
BY_ROW = BatchSettings(seed=3, num_epochs=2, max_steps=0, batch_tokens=0, batch_rows=1, micro_batch_tokens=80)
ModelMaker = Callable[..., PreTrainedModel]


class Run:
    """A tiny model with an adapter that is no longer fresh, rows, and a method."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[Any],
        method: str = "sft",
        *,
        dropout: float = 0.4,
        peak: float = 5e-3,
        batches: BatchSettings = BATCHES,
    ) -> None:
        self.loss: Loss | None = LOSSES[method]
        self.corpus = {"sft": corpus_of(rows), "kto": unpaired(20)}.get(method) or pairs(20)
        self.settings = settings_for(self.corpus, batches, peak)
        insert_lora(model, LoraSpec(rank=4, alpha=8.0, dropout=dropout), seed=11)
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter_parameters(model, "default").values():
            parameter.data.normal_(std=0.2, generator=generator)
        score = fresh_score(model, seed=5) if method == "reward_model" else None
        weights = Adapter(model, "default", base_model="tiny", score=score, seed=batches.seed)
        self.engine = Engine(weights, OPTIMISER, CPU)
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(self.corpus.lengths("TRAIN"), self.corpus.lengths("VALIDATION"), batches),
            settings=settings_record(self.settings, self.loss),
            optimiser=OPTIMISER,
            surroundings={},
        )

    def events(self, course: Course | None = None) -> Iterator[Event | Warned]:
        course = course or Course()
        return steps_of(self.loss, self.engine, self.corpus, self.settings, course, lambda: None)

    def finish(self, folder: Path, course: Course | None = None) -> list[Mapping[str, float]]:
        """Make all steps that are left; returns their metrics."""
        metrics: list[Mapping[str, float]] = []
        for event in self.events(course):
            if isinstance(event, CheckpointDue):
                checkpoint.save(folder, self.engine, event.course, self.identity)
            elif isinstance(event, StepDone):
                metrics.append(timeless(event.metrics))
        return metrics


@pytest.fixture
def make_run(tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]]) -> Callable[..., Run]:
    def make(method: str = "sft", **settings: Any) -> Run:
        return Run(tiny_llama(), token_rows(30), method, **settings)

    return make


RunMaker = Callable[..., Run]


@pytest.mark.parametrize("method", LOSSES)
def test_validations_and_references_drop_nothing(make_run: RunMaker, tmp_path: Path, method: str) -> None:
    runs = [make_run(method, dropout=dropout, peak=BARELY) for dropout in (0.0, 0.4)]
    plain, dropping = [run.finish(tmp_path) for run in runs]
    assert all(one["train_loss"] != other["train_loss"] for one, other in zip(plain, dropping, strict=True))
    validated = [
        [{key: value for key, value in one.items() if key.startswith("validation_")} for one in metrics]
        for metrics in (plain, dropping)
    ]
    assert validated[0] == validated[1]
    assert validated[0][-1]
    if method == "kto":
        assert [one["kl"] for one in plain] == [one["kl"] for one in dropping], "it is measured, not learnt"


def test_a_row_has_another_mask_in_each_epoch(make_run: RunMaker, tmp_path: Path) -> None:
    for dropout in (0.0, 0.4):
        run = make_run(dropout=dropout, peak=BARELY, batches=BY_ROW)
        steps = iterate_steps(run.corpus.lengths("TRAIN"), BY_ROW)
        metrics = run.finish(tmp_path)
        losses: dict[tuple[int, ...], list[float]] = {}
        for step, found in zip(steps, metrics, strict=True):
            losses.setdefault(step.micro_batches[0], []).append(found["train_loss"])
        assert all(len(both) == 2 for both in losses.values())
        differing = [both[0] != both[1] for both in losses.values()]
        assert all(differing) if dropout else not any(differing)


@pytest.mark.parametrize("method", LOSSES)
def test_masks_do_not_depend_on_how_a_step_is_cut(make_run: RunMaker, tmp_path: Path, method: str) -> None:
    losses = []
    for micro_batch_tokens in (48, 160):
        run = make_run(method, batches=replace(BATCHES, micro_batch_tokens=micro_batch_tokens))
        losses.append([one["train_loss"] for one in run.finish(tmp_path)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    other = make_run(method, dropout=0.3).finish(tmp_path)
    assert losses[0] != pytest.approx([one["train_loss"] for one in other], rel=1e-3)


def test_another_seed_drops_otherwise(make_run: RunMaker) -> None:
    losses = []
    for seed in (3, 3, 4):
        run = make_run(batches=replace(BATCHES, seed=seed))
        step = next(iterate_steps(run.corpus.lengths("TRAIN"), BATCHES))
        run.settings = replace(run.settings, batches=replace(BATCHES, max_steps=1))
        event = next(run.events())
        assert isinstance(event, StepDone)
        assert event.metrics["num_tokens"] == step.num_tokens
        losses.append(event.metrics["train_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("method", LOSSES)
def test_a_resumed_run_drops_what_it_would_have_dropped(
    make_run: RunMaker, tmp_path: Path, method: str
) -> None:
    whole = make_run(method)
    metrics = whole.finish(tmp_path / "whole")
    first = make_run(method)
    for event in first.events():
        if isinstance(event, CheckpointDue):
            checkpoint.save(tmp_path / "stopped", first.engine, event.course, first.identity)
            break
    second = make_run(method)
    course, changed = checkpoint.load(tmp_path / "stopped", second.engine, second.identity)
    assert (course.step, changed) == (3, [])
    assert second.finish(tmp_path / "resumed", course) == metrics[3:]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name
