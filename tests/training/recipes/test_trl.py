"""Each method's loss and gradients equal TRL's on the same model, adapter and batch, within rounding.

`trl_numbers.json` is what TRL made of them; where TRL is installed, it is asked again.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from tests.training.recipes.pairs import Example, corpus_of_units
from tests.training.recipes.trl_cases import (
    ALPHA,
    ANSWERS,
    CASES,
    NUMBERS,
    PAIRS,
    RANK,
    Pair,
    adapter_values,
    fingerprints,
    pairs_of,
    tiny_model,
)

from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.packed import WEIGHT
from luthier.lm.readouts import FusedLoss, TokenLogprobs
from luthier.training.recipes import preference, reward_model, unpaired
from luthier.training.recipes.batches import BatchSettings
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course, StepDone
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings
from luthier.training.recipes.objectives import Kto, Orpo, PairwiseReward, pair_counts, pair_objective
from luthier.training.recipes.schedule import RateCourse, Schedule
from luthier.training.recipes.units import CHOSEN, DESIRABLE, MISMATCHED, REJECTED, UNDESIRABLE
from luthier.training.recipes.weights import Adapter, fresh_score


def engine_for(*, with_score: bool = False) -> Engine:
    model = tiny_model()
    insert_lora(model, LoraSpec(rank=RANK, alpha=ALPHA), seed=0)
    score = fresh_score(model, 0) if with_score else None
    weights = Adapter(model, "default", base_model="tiny", score=score)
    values = adapter_values({name: one.shape for name, one in weights.parameters.items()})
    with torch.no_grad():
        for name, one in weights.parameters.items():
            one.copy_(values[name])
    return Engine(weights, OptimiserSettings(weight_decay=0.0, max_grad_norm=0.0), torch.device("cpu"))


def pair_corpus(pairs: list[Pair]) -> Corpus:
    units: list[tuple[Any, list[Example]]] = [
        ("TRAIN", [(CHOSEN, prompt, chosen), (REJECTED, prompt, rejected)])
        for prompt, chosen, rejected in pairs
    ]
    return corpus_of_units(units)


def answer_corpus() -> Corpus:
    units: list[tuple[Any, list[Example]]] = []
    for place, (prompt, answer, is_desirable) in enumerate(ANSWERS):
        other = ANSWERS[(place + 1) % len(ANSWERS)][1]
        role = DESIRABLE if is_desirable else UNDESIRABLE
        units.append(("TRAIN", [(role, prompt, answer), (MISMATCHED, prompt, other)]))
    return corpus_of_units(units)


def our_numbers(name: str, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One step of the recipe, its gradients looked at where they would change the weights."""
    method = CASES[name]
    engine = engine_for(with_score=isinstance(method, PairwiseReward))
    corpus = answer_corpus() if isinstance(method, Kto) else pair_corpus(pairs_of(name))
    found: dict[str, Any] = {}

    def update(_: float) -> float:
        gradients = {key: one.grad for key, one in engine.weights.parameters.items() if one.grad is not None}
        assert len(gradients) == len(engine.weights.parameters)
        found["gradients"] = fingerprints(gradients)
        return 1.0

    monkeypatch.setattr(engine, "update", update)
    batches = BatchSettings(
        seed=1,
        num_epochs=1,
        max_steps=0,
        batch_tokens=0,
        batch_rows=9,
        micro_batch_tokens=micro_batch_tokens,
    )
    schedule = Schedule(peak=1e-3, course=RateCourse.CONSTANT, warmup_steps=0, num_steps=1)
    settings = Settings(
        batches=batches, schedule=schedule, checkpoint_interval_steps=1, validation_interval_steps=1
    )
    given = (engine, corpus, settings)
    if isinstance(method, Kto):
        events = unpaired.train(*given, method, Course())
    elif isinstance(method, PairwiseReward):
        events = reward_model.train(*given, method, Course())
    else:
        events = preference.train(*given, method, Course())
    (done,) = [event for event in events if isinstance(event, StepDone)]
    return {"loss": done.metrics["train_loss"], **found}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Within 1e-5 of the loss, and of the largest norm of a gradient."""
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    largest = max(norm for norm, _ in theirs["gradients"].values())
    assert largest > 1e-3
    for key, (norm, product) in theirs["gradients"].items():
        assert ours["gradients"][key][0] == pytest.approx(norm, rel=1e-4, abs=1e-5 * largest), key
        assert ours["gradients"][key][1] == pytest.approx(product, rel=1e-4, abs=1e-4 * largest), key


@pytest.mark.parametrize("micro_batch_tokens", [200, 30], ids=["one_pass", "several_passes"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_what_trl_made_of_them(
    name: str, micro_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also KTO's in several passes, as z is the whole step's; TRL's own changes with the cut."""
    theirs = json.loads(NUMBERS.read_text())["cases"][name]
    assert_equal(our_numbers(name, micro_batch_tokens, monkeypatch), theirs)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl comes with the extra bench")
@pytest.mark.filterwarnings("ignore")  # those of TRL and its libraries
@pytest.mark.parametrize("name", CASES)
def test_committed_numbers_are_those_of_the_installed_trl(name: str) -> None:
    from tests.training.recipes.trl_numbers import numbers_of_trl

    assert_equal(numbers_of_trl(name), json.loads(NUMBERS.read_text())["cases"][name])


def test_orpo_learns_the_answer_alone_where_trl_learns_the_prompt_too() -> None:
    """The difference, and all of it: of longer prompts, TRL's first term is the mean over prompt and answer."""
    engine, corpus = engine_for(), pair_corpus(PAIRS)
    rows = [row.row for row in corpus.lengths("TRAIN")]
    counts = pair_counts(len(PAIRS), sum(len(chosen) for _, chosen, _ in PAIRS))
    batch = corpus.pack(rows)
    sums = engine.measure(batch, TokenLogprobs(), pair_objective(Orpo(beta=0.3), counts))
    of_answers = sums["nll_loss"] / counts["nll_loss"]

    chosen = corpus.pack(rows[::2])
    chosen.streams[WEIGHT].fill_(1.0)
    of_all, num_tokens = engine.score(chosen, FusedLoss())
    assert num_tokens == sum(len(prompt) + len(answer) - 1 for prompt, answer, _ in PAIRS)
    theirs = sums["train_loss"] / counts["train_loss"] - of_answers + of_all.item() / num_tokens
    assert theirs == pytest.approx(json.loads(NUMBERS.read_text())["orpo_on_long_prompts"], rel=1e-5)
