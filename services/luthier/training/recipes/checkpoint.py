"""Checkpoints: what a run needs to go on as if it had never stopped. The same state gives the same bytes.

the files of the weights   an adapter as PEFT writes it, or a model as transformers does
optimizer.safetensors      both moments of every trained tensor, float32, or codes of 8 bits and scales
trainer_state.json         where the run stands, its plan, settings and the step's metrics
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from luthier.errors import DataLoss, FailedPrecondition
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.weights import Weights

OPTIMISER_NAME = "optimizer.safetensors"
STATE_NAME = "trainer_state.json"
CHANGED_EARLIER = "earlier"
"""Stands for surroundings that changed before the checkpoint was taken."""
FORMAT = 3
_COURSE = ("step", "epoch", "position", "metrics")
_FORMAT_WITH_HISTORY = 2
"""As 3, with the metrics of every step so far in place of the last one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What a checkpoint shares with the run that it belongs to.

    Attributes:
        plan_digest: digest of all rows' lengths and of the batch settings.
        settings: those of the run's recipe, as JSON values.
        optimiser: how the run changes its weights.
        surroundings: all that the bits of its results depend on besides: versions, processor, threads, kernels.
        bitwise: whether the run has had these surroundings from its first step on.
    """

    plan_digest: str
    settings: Mapping[str, Any]
    optimiser: OptimiserSettings
    surroundings: Mapping[str, str]
    bitwise: bool = True


def files_of(weights: Weights) -> tuple[str, ...]:
    """Return the names of a checkpoint's files."""
    return (*weights.files, OPTIMISER_NAME, STATE_NAME)


def save(folder: Path, engine: Engine, course: Course, run: RunIdentity) -> None:
    """Write a checkpoint's files into a folder, made if missing. All ranks call it, and the first one writes."""
    if engine.collective.rank:
        return
    engine.weights.save(folder)
    moments = {name: tensor.contiguous().cpu() for name, tensor in engine.optimiser_state().items()}
    save_file(moments, folder / OPTIMISER_NAME)
    state = {"format": FORMAT, **asdict(course), **_identity(run)}
    state |= {"surroundings": dict(run.surroundings), "bitwise": run.bitwise}
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    (folder / STATE_NAME).write_text(text + "\n", encoding="utf-8")


def load(folder: Path, engine: Engine, run: RunIdentity) -> tuple[Course, list[str]]:
    """Put a checkpoint into an engine that has made no step; returns its course and what has changed around the run.

    The last names the surroundings that differ from the checkpoint's, and is `[CHANGED_EARLIER]` where they are the
    same but had changed before.

    Raises:
        DataLoss: a file is not as `save` writes it.
        FailedPrecondition: it is the checkpoint of a run with other rows or settings.
    """
    state = _read_state(folder / STATE_NAME)
    expected = json.loads(json.dumps(_identity(run)))
    differing = sorted(key for key, value in expected.items() if state.get(key) != value)
    if differing:
        raise FailedPrecondition(
            f"a checkpoint must be of the same run: its {', '.join(differing)} differ",
            metadata={"differing": ",".join(differing)},
        )
    engine.weights.load(folder)
    # A checkpoint of before runs were selected from, or had steps that teach nothing, has nothing of it.
    selected = {one.name: state[one.name] for one in fields(Course) if one.name in state}
    course = Course(**{name: state[name] for name in _COURSE} | selected)
    engine.load_optimiser_state(load_file(folder / OPTIMISER_NAME), course.step - course.idle_steps)
    before: dict[str, str] = state["surroundings"]
    surrounding = sorted(before.keys() | run.surroundings.keys())
    changed = [name for name in surrounding if before.get(name) != run.surroundings.get(name)]
    return course, changed or ([] if state["bitwise"] else [CHANGED_EARLIER])


def _identity(run: RunIdentity) -> dict[str, Any]:
    return {
        "plan_digest": run.plan_digest,
        "settings": dict(run.settings),
        "optimiser": _chosen(run.optimiser),
    }


def _chosen(settings: OptimiserSettings) -> dict[str, Any]:
    """Return what differs from its default: checkpoints of before there was a setting know nothing of it."""
    values = asdict(settings)
    return {one.name: values[one.name] for one in fields(settings) if values[one.name] != one.default}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataLoss(f"{path.name} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, _FORMAT_WITH_HISTORY):
        raise DataLoss(f"{path.name} must have format {FORMAT}")
    if state["format"] == _FORMAT_WITH_HISTORY:
        state["metrics"] = state.pop("history")[-1]
    return state
