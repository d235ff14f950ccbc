"""Preference tuning: it learns, does not depend on how a step is cut, and goes on after a stop as if it never had."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.pairs import corpus_of_units, pairs, put_word, unpaired
from transformers import PreTrainedModel

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.lm.adapter_files import load_adapter, save_adapter
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora
from luthier.training.recipes import checkpoint, preference, sft
from luthier.training.recipes import unpaired as unpaired_recipe
from luthier.training.recipes.batches import BatchSettings, count_steps, iterate_steps, plan_digest
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import TIMED_METRICS, CheckpointDue, Course, Event, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, settings_record
from luthier.training.recipes.objectives import Dpo, Ipo, Kto, Orpo, Simpo, needs_reference
from luthier.training.recipes.reference import (
    FILE_NAME,
    load_reference,
    reference_key,
    save_reference,
    score_reference,
    with_reference,
)
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.weights import Adapter, AllWeights

Loss = Dpo | Ipo | Orpo | Simpo | Kto
CPU = torch.device("cpu")
BATCHES = BatchSettings(
    seed=3, num_epochs=2, max_steps=0, batch_tokens=160, batch_rows=0, micro_batch_tokens=80
)
OPTIMISER = OptimiserSettings(weight_decay=0.01, max_grad_norm=1.0)
LOSSES: tuple[Loss, ...] = (
    Dpo(beta=0.1),
    Dpo(beta=0.2, label_smoothing=0.1, nll_weight=0.3),
    Ipo(beta=0.5),
    Orpo(beta=0.2),
    Simpo(beta=2.0, gamma=0.5),
    Kto(beta=0.2, desirable_weight=1.3),
)
NAMES = [f"{type(loss).__name__.lower()}{number}" for number, loss in enumerate(LOSSES)]
WEIGHTS = ("adapter", "all")
ModelMaker = Callable[..., PreTrainedModel]


def settings_for(corpus: Corpus, batches: BatchSettings = BATCHES, peak: float = 5e-3) -> Settings:
    num_steps = count_steps(corpus.lengths("TRAIN"), batches).num_steps
    return Settings(
        batches=batches,
        schedule=Schedule(peak=peak, course=RateCourse.COSINE, warmup_steps=2, num_steps=num_steps),
        checkpoint_interval_steps=3,
        validation_interval_steps=0,
    )


class Run:
    """Weights of a tiny model, pairs or single answers, and a method."""

    def __init__(self, model: PreTrainedModel, loss: Loss, kind: str, **changes: Any) -> None:
        self.loss = loss
        self.corpus: Corpus = unpaired(20) if isinstance(loss, Kto) else pairs(20)
        self.settings = settings_for(self.corpus, replace(BATCHES, **changes))
        if kind == "adapter":
            insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
            self.engine = Engine(Adapter(model, "default", base_model="tiny"), OPTIMISER, CPU)
        else:
            self.engine = Engine(AllWeights(model), OPTIMISER, CPU)
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(
                self.corpus.lengths("TRAIN"), self.corpus.lengths("VALIDATION"), self.settings.batches
            ),
            settings=settings_record(self.settings, loss),
            optimiser=OPTIMISER,
            surroundings={},
        )

    def score_reference(self) -> None:
        if isinstance(self.engine.weights, AllWeights):
            score_reference(self.engine, self.corpus, BATCHES.micro_batch_tokens)

    def events(self, course: Course | None = None) -> Iterator[Event]:
        given = course or Course()
        if isinstance(self.loss, Kto):
            return unpaired_recipe.train(self.engine, self.corpus, self.settings, self.loss, given)
        return preference.train(self.engine, self.corpus, self.settings, self.loss, given)

    def finish(self, events: Iterator[Event], folder: Path) -> list[Mapping[str, float]]:
        """Make all remaining steps; each checkpoint replaces the one before in `folder`."""
        metrics: list[Mapping[str, float]] = []
        for event in events:
            if isinstance(event, CheckpointDue):
                checkpoint.save(folder, self.engine, event.course, self.identity)
            else:
                timeless = {key: one for key, one in event.metrics.items() if key not in TIMED_METRICS}
                metrics.append(timeless)
        return metrics


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_train_raises_the_chosen_above_the_rejected(
    tiny_llama: ModelMaker, loss: Loss, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), loss, "adapter", num_epochs=6)
    steps = run.finish(run.events(), tmp_path)
    validations = [one for one in steps if "validation_loss" in one]
    first, last = validations[0], validations[-1]
    assert len(validations) == 6
    assert last["validation_loss"] < first["validation_loss"]
    assert last["validation_reward_margin"] > first["validation_reward_margin"]
    assert last["validation_reward_accuracy"] == 1.0
    assert last["train_loss"] < steps[0]["train_loss"]
    sides = [last[f"validation_reward_{side}"] for side in ("chosen", "rejected")]
    assert last["validation_reward_margin"] == pytest.approx(sides[0] - sides[1], rel=1e-4)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if isinstance(loss, Kto) or needs_reference(loss)])
def test_first_step_knows_no_margin_as_the_policy_is_the_reference(
    tiny_llama: ModelMaker, loss: Loss, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), loss, "adapter")
    (first, *_) = run.finish(run.events(), tmp_path)
    assert abs(first["reward_margin"]) < 1e-5
    again, *_ = run.finish(run.events(), tmp_path)  # the same rows, after a run
    assert again["reward_margin"] > 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_a_step_cut_into_micro_batches_equals_one_batch_within_rounding(
    tiny_llama: ModelMaker, loss: Loss, tmp_path: Path
) -> None:
    found = []
    for micro_batch_tokens in (40, 160):
        run = Run(tiny_llama(), loss, "adapter", micro_batch_tokens=micro_batch_tokens, max_steps=4)
        steps = run.finish(run.events(), tmp_path)
        cuts = [
            len(step.micro_batches)
            for step in iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)
        ]
        found.append(
            (steps, {name: one.detach() for name, one in run.engine.weights.parameters.items()}, cuts)
        )
    (cut, cut_weights, many), (whole, whole_weights, one) = found
    assert max(many) > 3
    assert max(one) == 1
    for left, right in zip(cut, whole, strict=True):
        assert left.keys() == right.keys()
        for name, value in right.items():
            assert left[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for name, tensor in whole_weights.items():
        torch.testing.assert_close(cut_weights[name], tensor, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_train_resumed_from_a_checkpoint_ends_with_the_same_bits(
    tiny_llama: ModelMaker, loss: Loss, kind: str, tmp_path: Path
) -> None:
    dtype = torch.bfloat16
    whole = Run(tiny_llama(dtype), loss, kind)
    whole.score_reference()
    if kind == "all":
        save_reference(whole.corpus, tmp_path, "key")
    wanted = whole.finish(whole.events(), tmp_path / "whole")

    first = Run(tiny_llama(dtype), loss, kind)
    first.score_reference()
    for event in first.events():
        if isinstance(event, CheckpointDue):
            checkpoint.save(tmp_path / "stopped", first.engine, event.course, first.identity)
        elif event.step == 5:  # killed two steps after the checkpoint of step 3
            break
    second = Run(tiny_llama(dtype), loss, kind)
    if kind == "all":
        load_reference(second.corpus, tmp_path, "key")
    course, changed = checkpoint.load(tmp_path / "stopped", second.engine, second.identity)
    rest = second.finish(second.events(course), tmp_path / "resumed")

    assert (course.step, changed) == (3, [])
    assert rest == wanted[3:]
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


@pytest.mark.parametrize("loss", [Dpo(beta=0.1, nll_weight=0.2), Kto(beta=0.1)], ids=["dpo", "kto"])
def test_train_does_not_depend_on_the_number_of_threads(
    tiny_llama: ModelMaker, loss: Loss, tmp_path: Path
) -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = Run(tiny_llama(torch.bfloat16), loss, "adapter", max_steps=3)
            run.finish(run.events(), tmp_path / str(threads))
            found.append(digests(tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_start_adapter_is_the_reference_of_the_one_that_goes_on_from_it(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    before = Run(tiny_llama(), Dpo(beta=0.1), "adapter")
    before.finish(before.events(), tmp_path / "checkpoints")
    save_adapter(before.engine.weights.model, "default", tmp_path / "start")

    model = tiny_llama()
    load_adapter(model, tmp_path / "start", "start")
    load_adapter(model, tmp_path / "start", "default")
    weights = Adapter(model, "default", base_model="tiny", reference="start")
    frozen = {name: one.detach().clone() for name, one in adapter_parameters(model, "start").items()}
    engine = Engine(weights, OPTIMISER, CPU)
    steps = [
        event.metrics
        for event in preference.train(engine, before.corpus, before.settings, Dpo(beta=0.1), Course())
        if isinstance(event, StepDone)
    ]
    assert steps[0]["reward_margin"] == 0.0
    assert steps[-1]["validation_reward_margin"] > 0.0
    for name, one in adapter_parameters(model, "start").items():
        assert torch.equal(one, frozen[name]), name
        assert one.grad is None
    batch = before.corpus.pack([0, 1])
    with_base = with_reference(before.engine, batch).streams["reference_logprob"]
    with_start = with_reference(engine, batch).streams["reference_logprob"]
    assert (with_base - with_start).abs().max() > 1e-3


def test_stored_reference_is_that_of_the_start_and_is_refused_for_another(
    tiny_llama: ModelMaker, tmp_path: Path
) -> None:
    run = Run(tiny_llama(), Dpo(beta=0.1), "all")
    run.score_reference()
    untouched = Run(tiny_llama(), Dpo(beta=0.1), "adapter")  # its reference is the base
    for split in ("TRAIN", "VALIDATION"):
        for row in list(run.corpus.lengths(split))[::3]:
            expected = with_reference(untouched.engine, untouched.corpus.pack([row.row], split))
            found = run.corpus.pack([row.row], split)
            torch.testing.assert_close(
                found.streams["reference_logprob"], expected.streams["reference_logprob"]
            )
    save_reference(run.corpus, tmp_path, reference_key({"rendering": "a", "model": "b"}))
    with pytest.raises(FailedPrecondition, match="must be of this run's rows and start model"):
        load_reference(run.corpus, tmp_path, reference_key({"rendering": "a", "model": "c"}))
    with pytest.raises(DataLoss, match="float32 for each of the"):
        load_reference(pairs(5), tmp_path, reference_key({"model": "b", "rendering": "a"}))
    (tmp_path / FILE_NAME).write_bytes(b"nonsense")
    with pytest.raises(DataLoss, match="cannot be read"):
        load_reference(run.corpus, tmp_path, "key")


def test_rows_of_another_method_are_refused_and_named(tiny_llama: ModelMaker) -> None:
    run = Run(tiny_llama(), Dpo(beta=0.1), "adapter")
    singles = corpus_of_units([("TRAIN", [("", [5, 6], [7, 8])]), ("TRAIN", [("", [5, 6], [7])])])
    cases: list[tuple[Any, Corpus, str]] = [
        (preference.train, singles, r"must be chosen \+ rejected, that of row 0 is a single row"),
        (preference.train, unpaired(20), r"that of row 0 is (un)?desirable \+ mismatched"),
        (unpaired_recipe.train, pairs(20), r"must be desirable \+ mismatched or undesirable \+ mismatched"),
    ]
    for train, corpus, message in cases:
        loss: Any = Kto(beta=0.1) if train is unpaired_recipe.train else Dpo(beta=0.1)
        with pytest.raises(FailedPrecondition, match=message) as caught:
            next(train(run.engine, corpus, run.settings, loss, Course()))
        assert caught.value.reason == Reason.ROWS_NOT_OF_METHOD
    with pytest.raises(FailedPrecondition, match="must be a single row, that of row 0 is chosen") as caught:
        next(sft.train(run.engine, pairs(20), run.settings, Course()))
    assert caught.value.reason == Reason.ROWS_NOT_OF_METHOD
    half = corpus_of_units([("TRAIN", [("chosen", [5, 6], [7, 8]), ("rejected", [5, 6], [])])])
    with pytest.raises(FailedPrecondition, match="row 1 of the unit of row 0 has none") as caught:
        next(preference.train(run.engine, half, run.settings, Dpo(beta=0.1), Course()))
    assert caught.value.reason == Reason.NO_SUPERVISED_TOKENS


@pytest.mark.parametrize("loss", [Dpo(beta=0.1), Kto(beta=0.1)], ids=["dpo", "kto"])
def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(
    tiny_llama: ModelMaker, loss: Loss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_llama()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    run = Run(model, loss, "adapter")
    step = next(iter(iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches)))
    bad, word = step.micro_batches[-1][0], 96  # which no row has
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = float("inf")
    put_word(monkeypatch, run.corpus, bad, word)
    with pytest.raises(
        FailedPrecondition, match=r"must be finite, got nan at step 1, whose rows are"
    ) as caught:
        run.finish(run.events(), tmp_path)
    named = [int(row) for row in caught.value.metadata["rows"].split(",")]
    assert caught.value.reason == Reason.LOSS_NOT_FINITE
    assert bad in named
    assert len(named) < len({row for batch in step.micro_batches for row in batch})
