"""Runs on mixed renderings: the same bits after a stop, and nothing counted together that is of two renderings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

import pytest
import torch
from tests.training.conftest import TokenRow
from tests.training.recipes.pairs import pairs, unpaired
from tests.training.recipes.test_sft import BATCHES, OPTIMISER, corpus_of
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.training.recipes import checkpoint, preference, reward_model, sft
from luthier.training.recipes import unpaired as unpaired_recipe
from luthier.training.recipes.batches import count_steps, iterate_steps, plan_digest, shares_reached
from luthier.training.recipes.corpus import Corpus, joined
from luthier.training.recipes.course import (
    TIMED_METRICS,
    CheckpointDue,
    Course,
    Event,
    Selection,
    StepDone,
)
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.loop import Settings, pack_validation, settings_record
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.objectives import Dpo, Kto, PairwiseReward
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.units import PAIR, SINGLE, require_units
from luthier.training.recipes.weights import Adapter, fresh_score

Loss = Dpo | Kto | PairwiseReward | None
ModelMaker = Callable[..., PreTrainedModel]
RowMaker = Callable[..., list[Any]]
LOSSES: Mapping[str, Loss] = {
    "sft": None,
    "dpo": Dpo(beta=0.1),
    "kto": Kto(beta=0.1),
    "reward_model": PairwiseReward(centring=0.01),
}
NAMES = ("songs", "general")


def parts_of(loss: Loss, token_rows: RowMaker) -> list[Corpus]:
    """The run's own rendering, and one that is mixed in."""
    match loss:
        case None:
            return [corpus_of(token_rows(40)), corpus_of(token_rows(15, seed=9))]
        case Kto():
            return [unpaired(20), unpaired(9, seed=5)]
        case Dpo() | PairwiseReward():
            return [pairs(20), pairs(9, seed=5)]
        case _:
            assert_never(loss)


class Run:
    """An adapter of a tiny model, two renderings and a method."""

    def __init__(self, model: PreTrainedModel, loss: Loss, parts: list[Corpus], **changes: Any) -> None:
        self.loss = loss
        self.parts = parts
        self.corpus, firsts = joined(parts)
        self.mixture = Mixture(
            names=NAMES, first_rows=firsts, shares=(0.7, 0.3), measure="UNITS" if loss else "TOKENS"
        )
        batches = replace(BATCHES, batch_tokens=160, num_epochs=3)
        num_steps = count_steps(self.corpus.lengths("TRAIN"), batches, self.mixture).num_steps
        self.settings = replace(
            Settings(
                batches=batches,
                schedule=Schedule(peak=5e-3, course=RateCourse.COSINE, warmup_steps=2, num_steps=num_steps),
                checkpoint_interval_steps=3,
                validation_interval_steps=0,
                mixture=self.mixture,
            ),
            **changes,
        )
        score = fresh_score(model, seed=5) if isinstance(loss, PairwiseReward) else None
        insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
        weights = Adapter(model, "default", base_model="tiny", score=score)
        self.engine = Engine(weights, OPTIMISER, torch.device("cpu"))
        train, validation = self.corpus.lengths("TRAIN"), self.corpus.lengths("VALIDATION")
        self.identity = checkpoint.RunIdentity(
            plan_digest=plan_digest(train, validation, batches, self.mixture),
            settings=settings_record(self.settings, loss),
            optimiser=OPTIMISER,
            surroundings={},
        )

    def events(self, course: Course | None = None) -> Iterator[Event]:
        given = (self.engine, self.corpus, self.settings)
        match self.loss:
            case None:
                return sft.train(*given, course or Course())
            case Kto():
                return unpaired_recipe.train(*given, self.loss, course or Course())
            case PairwiseReward():
                return reward_model.train(*given, self.loss, course or Course())
            case Dpo():
                return preference.train(*given, self.loss, course or Course())
            case _:
                assert_never(self.loss)

    def validate(self, corpus: Corpus) -> dict[str, float]:
        """What the method measures with these weights on the validation rows of a rendering alone."""
        limit = self.settings.batches.micro_batch_tokens
        batches = pack_validation(corpus, limit)
        match self.loss:
            case None:
                return sft.validate(self.engine, corpus, batches)
            case Kto():
                return unpaired_recipe.validate(self.engine, corpus, self.loss, batches, limit)
            case PairwiseReward():
                return reward_model.validate(self.engine, corpus, self.loss, batches)
            case Dpo():
                return preference.validate(self.engine, corpus, self.loss, batches)
            case _:
                assert_never(self.loss)

    def finish(self, events: Iterator[Event], folder: Path) -> list[Mapping[str, float]]:
        """Make all remaining steps; each checkpoint replaces the one before in `folder`."""
        metrics: list[Mapping[str, float]] = []
        for event in events:
            if isinstance(event, CheckpointDue):
                checkpoint.save(folder, self.engine, event.course, self.identity)
            else:
                metrics.append({key: one for key, one in event.metrics.items() if key not in TIMED_METRICS})
        return metrics


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(params=LOSSES)
def make_run(
    request: pytest.FixtureRequest, tiny_llama: ModelMaker, token_rows: RowMaker
) -> Callable[..., Run]:
    """Makes a run of each method."""
    loss = LOSSES[request.param]
    return lambda **changes: Run(tiny_llama(), loss, parts_of(loss, token_rows), **changes)


def test_a_mixed_run_goes_on_after_a_stop_with_the_same_bits(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    whole = make_run()
    metrics = whole.finish(whole.events(), tmp_path / "whole")
    first = make_run()
    for event in first.events():
        if isinstance(event, CheckpointDue):
            checkpoint.save(tmp_path / "stopped", first.engine, event.course, first.identity)
        elif event.step == 5:  # killed two steps after the checkpoint of step 3
            break
    second = make_run()
    course, _ = checkpoint.load(tmp_path / "stopped", second.engine, second.identity)
    rest = second.finish(second.events(course), tmp_path / "resumed")
    assert len(metrics) > 5
    assert rest == metrics[3:]
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")


def test_validations_are_those_of_each_rendering_alone(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """To the last bit: no forward pass, no sum and no count has rows of two renderings."""
    run = make_run()
    last = run.finish(run.events(), tmp_path)[-1]
    found = {name: value for name, value in last.items() if name.startswith("validation_")}
    own, general = map(run.validate, run.parts)
    assert found == own | {f"{name}_1": value for name, value in general.items()}
    assert own["validation_loss"] != general["validation_loss"]


def test_a_step_tells_what_share_of_it_is_mixed_in(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run()
    metrics = run.finish(run.events(), tmp_path)
    steps = list(iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches, mixture=run.mixture))
    expected = [shares_reached(step.drawn, run.mixture)[1] for step in steps]
    assert [one["share_1"] for one in metrics] == expected
    totals = count_steps(run.corpus.lengths("TRAIN"), run.settings.batches, run.mixture)
    assert shares_reached(totals.drawn, run.mixture)[1] == pytest.approx(0.3, abs=0.03)
    assert [one["num_tokens"] for one in metrics] == [step.num_tokens for step in steps]


def test_a_run_may_be_judged_by_what_is_mixed_in(tiny_llama: ModelMaker, token_rows: RowMaker) -> None:
    selection = Selection(metric="validation_loss_1", direction="MIN")
    run = Run(tiny_llama(), None, parts_of(None, token_rows), selection=selection)
    values: dict[int, float] = {}
    last = Course()
    for event in run.events():
        if isinstance(event, StepDone):
            values |= (
                {event.step: event.metrics[selection.metric]} if selection.metric in event.metrics else {}
            )
        else:
            last = event.course
    assert (last.best_step, last.best_value) == min(values.items(), key=lambda item: item[1])


def test_a_loss_that_is_not_finite_names_rows_by_their_rendering(
    tiny_llama: ModelMaker, token_rows: RowMaker
) -> None:
    model = tiny_llama()
    run = Run(model, None, parts_of(None, token_rows))
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(FailedPrecondition) as caught:
        list(run.events())
    rows = caught.value.metadata["rows"].split(",")
    renderings = caught.value.metadata["renderings"].split(",")
    assert caught.value.reason == Reason.LOSS_NOT_FINITE
    assert set(renderings) == set(NAMES)
    in_step = next(iterate_steps(run.corpus.lengths("TRAIN"), run.settings.batches, mixture=run.mixture))
    places = {run.mixture.place(row) for batch in in_step.micro_batches for row in batch}
    named = set(zip(renderings, map(int, rows), strict=True))
    assert named <= places
    assert all(row < 15 for name, row in named if name == "general")
    assert f"{rows[renderings.index('general')]}" in caught.value.message
    assert " of general" in caught.value.message


def test_a_validation_that_is_not_finite_names_its_own_rows(
    tiny_llama: ModelMaker, token_rows: RowMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny_llama(), None, parts_of(None, token_rows))
    monkeypatch.setattr(
        sft,
        "validate",
        lambda engine, corpus, batches, check: {
            "validation_loss": float("nan") if run.mixture.source(batches[0][0]) else 1.0
        },
    )
    with pytest.raises(FailedPrecondition, match=r"validation_loss_1 must be finite, got nan") as caught:
        list(run.events())
    # Every fifth row is one of validation.
    assert (caught.value.metadata["rows"], caught.value.metadata["renderings"]) == (
        "4,9,14",
        "general,general,general",
    )


def test_rows_of_another_method_are_named_by_their_rendering(token_rows: RowMaker) -> None:
    corpus, firsts = joined([corpus_of(token_rows(5)), pairs(3)])
    mixture = Mixture(names=NAMES, first_rows=firsts, shares=(0.5, 0.5), measure="TOKENS")
    with pytest.raises(FailedPrecondition, match=r"that of row 0 of general is chosen \+ rejected") as caught:
        require_units(corpus.lengths("TRAIN"), corpus.roles("TRAIN"), SINGLE, mixture)
    assert (caught.value.metadata["row"], caught.value.metadata["rendering"]) == ("0", "general")
    with pytest.raises(FailedPrecondition, match=r"that of row 0 of songs is a single row"):
        require_units(corpus.lengths("TRAIN"), corpus.roles("TRAIN"), PAIR, mixture)


def test_joined_rows_keep_their_tokens_units_and_roles() -> None:
    corpus, firsts = joined([pairs(20), pairs(9, seed=5)])
    assert firsts == (0, 40)
    alone = pairs(9, seed=5)
    for split in ("TRAIN", "VALIDATION"):
        rows = [length.row for length in alone.lengths(split)]
        batch, other = corpus.pack([row + 40 for row in rows], split), alone.pack(rows, split)
        assert torch.equal(batch.input_ids, other.input_ids)
        assert (batch.roles, batch.rows) == (other.roles, tuple(row + 40 for row in other.rows))
        units = {length.row: length.unit for length in corpus.lengths(split)}
        for length in alone.lengths(split):
            assert units[length.row + 40] == (None if length.unit is None else length.unit + 40)


def test_a_corpus_of_one_rendering_is_not_changed_by_being_joined(token_rows: RowMaker) -> None:
    rows: list[TokenRow] = token_rows(20)
    alone = corpus_of(rows)
    corpus, firsts = joined([alone])
    assert firsts == (0,)
    assert list(corpus.lengths("TRAIN")) == list(alone.lengths("TRAIN"))
