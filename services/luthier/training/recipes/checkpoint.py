"""Checkpoints: what a run needs to go on as if it had never stopped. The same state gives the same bytes.

the files of the weights   an adapter as PEFT writes it, or a model as transformers does
optimizer.safetensors      both moments of every trained tensor, float32, or codes of 8 bits and scales
trainer_state.json         where the run stands, its plan, settings and the step's metrics

Of all weights of a model that is divided among ranks, masters and moments are in files of each rank's parts, in place
of one file each (`parts`). Any number of ranks reads either, divided or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.errors import DataLoss, FailedPrecondition
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.parts import part_files, read_parts, write_parts

OPTIMISER_NAME = "optimizer.safetensors"
OPTIMISER = "optimizer"
"""Stem of the files that hold parts of moments."""
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


def save(folder: Path, engine: Engine, course: Course, run: RunIdentity) -> list[Path]:
    """Write a checkpoint's files into a folder, made if missing; returns those that this rank wrote.

    All ranks call it, each with a folder of its own. The first one writes, of a divided model all do.
    """
    weights, rank = engine.weights, engine.collective.rank
    if rank and weights.shards is None:
        return []
    written = _save_beside(folder, engine) if _is_alone(engine) else _save_in_turn(folder, engine)
    if rank:
        return written
    state = {"format": FORMAT, **asdict(course), **_identity(run)}
    state |= {"surroundings": dict(run.surroundings), "bitwise": run.bitwise}
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    (folder / STATE_NAME).write_text(text + "\n", encoding="utf-8")
    return [*written, folder / STATE_NAME]


def _is_alone(engine: Engine) -> bool:
    """Whether writing is all that it takes: no rank is asked for its part, and nothing is copied from a device."""
    return engine.weights.shards is None and engine.weights.model.device.type == "cpu"


def _save_in_turn(folder: Path, engine: Engine) -> list[Path]:
    written = engine.weights.save(folder, engine.collective.rank)
    return [*written, *_save_moments(folder, engine)]


def _save_beside(folder: Path, engine: Engine) -> list[Path]:
    """Write moments beside the weights: the loop waits for both, and while it does its processors are idle.

    safetensors writes tensors from where they lie since 0.8: before, each file was copied whole first, and both copies
    would be held beside the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as beside:
        moments = beside.submit(_save_moments, folder, engine)
        written = engine.weights.save(folder)
    return [*written, *moments.result()]


def _save_moments(folder: Path, engine: Engine) -> list[Path]:
    shards, rank = engine.weights.shards, engine.collective.rank
    moments = _divided(engine, engine.optimiser_state())
    if engine.weights.keeps_parts:
        divided = engine.weights.divided
        # What every rank has whole is the first one's to write.
        own = {name: one for name, one in moments.items() if not rank or _of(name) in divided}
        return write_parts(folder, OPTIMISER, own, rank)
    if shards is not None:
        moments = dict(shards.whole(moments.items()))
    if rank:
        return []
    save_file({name: one.contiguous().cpu() for name, one in moments.items()}, folder / OPTIMISER_NAME)
    return [folder / OPTIMISER_NAME]


def _divided(engine: Engine, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments of parts as all ranks have them together, in the same memory, and others as they are."""
    shards, divided = engine.weights.shards, engine.weights.divided
    return {
        name: one if shards is None or _of(name) not in divided else shards.divided(one, divided[_of(name)])
        for name, one in moments.items()
    }


def _of(moment: str) -> str:
    """Return the name of the parameter whose moment it is."""
    return moment.rpartition(".")[0]


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
    _load_moments(folder, engine, course.step - course.idle_steps)
    before: dict[str, str] = state["surroundings"]
    surrounding = sorted(before.keys() | run.surroundings.keys())
    changed = [name for name in surrounding if before.get(name) != run.surroundings.get(name)]
    return course, changed or ([] if state["bitwise"] else [CHANGED_EARLIER])


def _load_moments(folder: Path, engine: Engine, num_updates: int) -> None:
    parts = part_files(folder, OPTIMISER)
    if not parts and engine.weights.shards is None:
        engine.load_optimiser_state(load_file(folder / OPTIMISER_NAME), num_updates)
        return
    # Of an engine that has made no step they are zeros of their own.
    moments = engine.optimiser_state()
    read_parts(parts or [folder / OPTIMISER_NAME], _divided(engine, moments))
    engine.load_optimiser_state(moments, num_updates)


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
