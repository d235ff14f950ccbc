"""Contenders that take turns, each run in a process of its own: what benchmarks of drawing and answering share.

A benchmark calls itself with `--child CONTENDER TASK RESULT`, and writes what that contender measured as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from child_process import Measured, measured_apart
from sft_step import made_up_records
from sft_step_meter import peak_rss_bytes
from sft_step_task import demo_model, fresh_adapter, render_rows, tiny_model

OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawTask:
    """What everyone draws: answers of one length, as no token ends them.

    Attributes:
        model: folder with config.json, model.safetensors and the tokenizer.
        adapter: folder with the adapter that is active, in PEFT's format.
        prompts: token ids.
        num_samples: answers to each prompt.
        new_tokens: tokens of each answer.
        num_steps: optimiser steps, each over all prompts; of generation: rounds.
        micro_batch_tokens: most tokens of a packed forward pass.
        num_shared: tokens that all prompts begin with.
    """

    model: Path
    adapter: Path
    prompts: tuple[tuple[int, ...], ...]
    num_samples: int
    new_tokens: int
    num_steps: int
    micro_batch_tokens: int = 2048
    num_shared: int = 0

    def save(self, path: Path) -> None:
        """Write the task as JSON."""
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> DrawTask:
        """Read a task."""
        stored = json.loads(path.read_text())
        stored["prompts"] = tuple(map(tuple, stored["prompts"]))
        return cls(**{**stored, "model": Path(stored["model"]), "adapter": Path(stored["adapter"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do a task.

    Attributes:
        run: does it, and returns what it measured.
        configuration: what a reader has to know to judge it.
        packages: what has to be installed.
    """

    run: Callable[[DrawTask], Measured]
    configuration: str
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def make_task(folder: Path, num_prompts: int, *, model: Path | None, fast: bool, **changes: int) -> DrawTask:
    """Prepare model, adapter and prompts, sums of differing lengths; files of this run alone go into `folder`."""
    records = made_up_records(num_prompts)
    chosen = model or (tiny_model(folder / "model", records) if fast else demo_model())
    rows = render_rows(records, chosen, num_prompts)
    return DrawTask(
        model=chosen,
        adapter=fresh_adapter(chosen, folder / "adapter"),
        prompts=tuple(row.ids[: row.supervised.index(True)] for row in rows),
        **changes,
    )


def with_shots(task: DrawTask, records: Sequence[object]) -> DrawTask:
    """The same prompts, each behind the same examples: records as they are rendered whole."""
    shots = [token for row in render_rows(records, task.model, len(records)) for token in row.ids]
    prompts = tuple((*shots, *prompt) for prompt in task.prompts)
    return replace(task, prompts=prompts, num_shared=len(shots))


def timed(num_rounds: int, draw: Callable[[int], int]) -> Measured:
    """Time rounds from 1 on, each of which returns how many tokens it drew."""
    seconds, tokens = [], []
    for number in range(1, num_rounds + 1):
        began = time.perf_counter()
        tokens.append(draw(number))
        seconds.append(time.perf_counter() - began)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }


def run_child(script: Path, task: Path, name: str, contender: Contender) -> Measured:
    """Measure one contender in a process of its own; `error` says why where it failed."""
    result = task.with_name("result.json")
    return measured_apart(script, ("--child", name, task, result), result, contender.missing())


def in_turns(
    script: Path, task: Path, contenders: Mapping[str, Contender], repeats: int
) -> dict[str, list[Measured]]:
    """Each contender's rounds, in which all take a turn; one that fails has that error alone."""
    runs: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, contender in contenders.items():
            if runs[name] and "error" in runs[name][0]:
                continue
            measured = run_child(script, task, name, contender)
            runs[name] = [measured] if "error" in measured else [*runs[name], measured]
            print(f"round {turn + 1}/{repeats} {name}: {measured}", file=sys.stderr, flush=True)
    return runs


def child(arguments: Sequence[str], contenders: Mapping[str, Contender]) -> int:
    """Run one contender: name, task file, file of the result."""
    name, task, result = arguments
    Path(result).write_text(json.dumps(contenders[name].run(DrawTask.load(Path(task)))))
    return 0
