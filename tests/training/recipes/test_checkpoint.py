"""What a checkpoint's files cost the loop: they are written beside each other, and are what they were in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipes.test_engine import CPU, OPTIMISER, batch_of, learnt
from transformers import PreTrainedModel

from luthier.lm.load import load_model
from luthier.lm.readouts import FusedLoss
from luthier.training.recipes import checkpoint
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import AllWeights

RUN = checkpoint.RunIdentity(plan_digest="d", settings={}, optimiser=OPTIMISER, surroundings={})


@pytest.fixture
def engine(
    tiny_llama: Callable[..., PreTrainedModel], token_rows: Callable[..., list[Any]], tmp_path: Path
) -> Engine:
    """One that has made a step."""
    tiny_llama().save_pretrained(tmp_path / "base")
    made = Engine(AllWeights(load_model(tmp_path / "base", torch.bfloat16)), OPTIMISER, CPU)
    batch = batch_of(token_rows(3))
    made.accumulate(batch, FusedLoss(), supervised(learnt([batch])))
    made.update(1e-3)
    return made


def test_moments_are_written_while_weights_are(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins only once the other has: in turn neither would end."""
    both = threading.Barrier(2, timeout=60)
    in_turn, moments = engine.weights.save, engine.optimiser_state

    def save(folder: Path, rank: int = 0) -> list[Path]:
        both.wait()
        return in_turn(folder, rank)

    def state() -> dict[str, torch.Tensor]:
        both.wait()
        return moments()

    with monkeypatch.context() as patched:
        patched.setattr(engine.weights, "save", save)
        patched.setattr(engine, "optimiser_state", state)
        beside = checkpoint.save(tmp_path / "beside", engine, Course(step=1), RUN)
    before = checkpoint._save_in_turn(tmp_path / "in_turn", engine)
    assert [path.name for path in beside] == [*(path.name for path in before), checkpoint.STATE_NAME]
    for path in before:
        assert path.read_bytes() == (tmp_path / "beside" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("which", ["weights", "moments"])
def test_what_cannot_be_written_is_raised_whoever_writes_it(
    engine: Engine, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    if which == "weights":
        monkeypatch.setattr(engine.weights, "save", fail)
    else:
        monkeypatch.setattr(engine, "optimiser_state", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "full", engine, Course(step=1), RUN)
