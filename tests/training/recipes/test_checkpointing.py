"""Runs of every method have the same bits whatever their layers keep of a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes import prompt_runs, test_dropout, test_preference
from tests.training.recipes.test_sft import corpus_of
from transformers import PreTrainedModel

from luthier.lm.blocks import use_kernels
from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.kept import CHECKPOINTINGS, Checkpointing
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import Dpo, supervised
from luthier.training.recipes.weights import AllWeights

ModelMaker = Callable[..., PreTrainedModel]
Finished = tuple[list[Mapping[str, float]], dict[str, str]]
CASES = ("sft", "dpo", "kto", "reward_model", "dpo_all", "grpo", "grpo_all")
"""Adapters, which drop where rows are learnt, and all weights."""


class Passes:
    """Counts how often the first layer of a model is passed through."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_calls = 0
        inner: Any = model.base_model
        inner.layers[0].mlp.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_calls += 1


def finished(
    case: str, kept: Checkpointing, model: PreTrainedModel, rows: list[Any], folder: Path
) -> tuple[Finished, int]:
    """Return the metrics of every step, the digests of the last checkpoint's files, and how many passes there were."""
    use_kernels(model)
    passes = Passes(model)
    checkpoint_layers(model, kept)
    run = run_of(case, model, rows)
    metrics: list[Mapping[str, float]] = (
        run.finish(run.events(), folder) if isinstance(run, test_preference.Run) else run.finish(folder)
    )
    return (metrics, prompt_runs.digests(folder)), passes.num_calls


def run_of(case: str, model: PreTrainedModel, rows: list[Any]) -> Any:
    if case.startswith("grpo"):
        kind = "all" if case.endswith("_all") else "adapter"
        loss = replace(prompt_runs.LOSS, kl_weight=0.1)
        return prompt_runs.Run(model, loss=loss, kind=kind, max_steps=3)
    if case == "dpo_all":
        run = test_preference.Run(model, Dpo(beta=0.1), "all", max_steps=3)
        run.score_reference()
        return run
    return test_dropout.Run(model, rows, case, batches=replace(test_preference.BATCHES, max_steps=3))


@pytest.mark.parametrize("kept", CHECKPOINTINGS[1:])
@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_same_bits_whatever_its_layers_keep(
    tiny_llama: ModelMaker,
    token_rows: Callable[..., list[Any]],
    tmp_path: Path,
    case: str,
    kept: Checkpointing,
) -> None:
    (plain, few), (found, many) = (
        finished(case, one, tiny_llama(), token_rows(30), tmp_path / one) for one in ("NONE", kept)
    )
    assert plain == found
    assert plain[0], "metrics of every step"
    assert many > few, "passes that learn are made again, others are not"


@pytest.mark.parametrize("kept", CHECKPOINTINGS[1:])
def test_all_weights_learn_the_same_bits_from_answers(
    tiny_llama: ModelMaker, token_rows: Callable[..., list[Any]], kept: Checkpointing
) -> None:
    """In bfloat16, with masters that add up what hooks bring them from a backward pass."""
    corpus = corpus_of(token_rows(12))
    found = []
    for one in ("NONE", kept):
        model = tiny_llama(torch.bfloat16)
        use_kernels(model)
        checkpoint_layers(model, one)
        engine = Engine(AllWeights(model), test_preference.OPTIMISER, test_preference.CPU)
        norms = []
        for _ in range(3):
            for rows in ((0, 1, 2), (3, 5)):
                engine.accumulate(corpus.pack(rows), FusedLoss(), supervised(40))
            norms.append(engine.update(5e-3))
        found.append((norms, {name: weight.clone() for name, weight in engine.weights.parameters.items()}))
    (norms, plain), (others, again) = found
    assert norms == others
    assert all(torch.equal(plain[name], again[name]) for name in plain)
