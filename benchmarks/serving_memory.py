"""What a base model in a process of its own takes, with an evaluation and calls on it, against one in the worker's.

`python benchmarks/serving_memory.py` starts real services and asks the demo's base model: an evaluation runs, and calls
of GenerateText come beside it. It does so with `luthierd worker evaluation`, whose driver holds no model (DECISIONS
86), and with a worker that computes in its own process (`serving_memory_together.py`), in turns. Memory is that of the
worker and of all that it started, while both go on: pages that several processes share are counted once (Pss). The
medians of both go to results/serving_memory.json; the last line is JSON:

    memory_ratio        the most that was held with a process of the model's own, by the most without
    first_token_ratio   time to the first piece of a call beside the evaluation, likewise

`--fast` is a smoke run on a tiny random model; it writes no results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_check_job import prepare
from service_processes import Stack, running
from serving_first_token import FAST, SIZE, Size, begun_evaluation, beside, first_token, prompt_of
from sft_step import made_up_records, surroundings
from sft_step_task import demo_model, tiny_model

from luthier.client import Client

RESULTS = Path(__file__).parent / "results" / "serving_memory.json"
APART = "apart"
TOGETHER = "together"
_LOOK_SECONDS = 0.1
_MOST_EVALUATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one round with one kind of worker.

    Attributes:
        held_bytes: the most that the worker and all that it started had at a time.
        worker_bytes: what the worker's own process had of it then.
        first_token_seconds: of each call.
    """

    held_bytes: int
    worker_bytes: int
    first_token_seconds: list[float]


def processes_of(pid: int) -> list[int]:
    """Return a process and all that it started, and those, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def held_bytes(pid: int) -> int:
    """Return a process's part of memory, of shared pages its share; 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


class _Watching:
    """Looks again and again at what a worker holds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.held_bytes = 0
        self.worker_bytes = 0

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            each = {one: held_bytes(one) for one in processes_of(self._pid)}
            if sum(each.values()) > self.held_bytes:
                self.held_bytes, self.worker_bytes = sum(each.values()), each[self._pid]

    def __enter__(self) -> _Watching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measured(stack: Stack, client: Client, version: str, size: Size) -> Found:
    """Ask the worker that runs: an evaluation, and calls beside it."""
    draw = random.Random(5)
    first_token(client, prompt_of(draw, size))  # the model is loaded, and both kinds have asked it before
    with _Watching(stack.processes["worker evaluation"].pid) as watching:
        seconds = _calls(client, version, size, draw)
    return Found(
        held_bytes=watching.held_bytes, worker_bytes=watching.worker_bytes, first_token_seconds=seconds
    )


def _calls(client: Client, version: str, size: Size, draw: random.Random) -> list[float]:
    """Return how long each call beside an evaluation waited for its first piece; the last evaluation is over then."""
    seconds: list[float] = []
    for _ in range(_MOST_EVALUATIONS):
        evaluation = begun_evaluation(client, version, size)
        while spent := beside(client, evaluation, prompt_of(draw, size), draw):
            seconds.append(spent)
            if len(seconds) == size.calls:
                client.evaluations.cancel(evaluation)
                deque(client.evaluations.watch(evaluation), maxlen=0)
                return seconds
    raise RuntimeError(f"{_MOST_EVALUATIONS} evaluations ended beside {len(seconds)} calls")


@contextmanager
def worker_of(stack: Stack, kind: str) -> Iterator[None]:
    """Have one kind of evaluation worker for the length of a block, begun anew."""
    if kind == APART:
        stack.start_worker("evaluation")
    else:
        stack.launch("worker evaluation", str(Path(__file__).with_name("serving_memory_together.py")))
    try:
        yield
    finally:
        process = stack.processes.pop("worker evaluation")
        process.terminate()
        process.wait(60)


def in_turns(model: Path, home: Path, size: Size, rounds: int) -> dict[str, list[Found]]:
    """Measure both kinds of worker in turns, the first one another in each round."""
    found: dict[str, list[Found]] = {APART: [], TOGETHER: []}
    with running(home, "cpu") as stack, stack.client() as client:
        rendering = prepare(stack, client, model)
        version = client.renderings.get(rendering).dataset_version
        first = stack.processes.pop("worker evaluation")
        first.terminate()
        first.wait(60)
        for number, place in itertools.product(range(rounds), range(2)):
            kind = (APART, TOGETHER)[(number + place) % 2]
            with worker_of(stack, kind):
                found[kind].append(measured(stack, client, version, size))
            print(f"{kind}: {found[kind][-1]}", file=sys.stderr, flush=True)
    return found


def summary_of(found: Mapping[str, Sequence[Found]]) -> dict[str, Any]:
    """Return the medians of both kinds, and the ratios that releases are compared by."""
    medians = {
        kind: {
            "held_bytes": statistics.median(one.held_bytes for one in rounds),
            "worker_bytes": statistics.median(one.worker_bytes for one in rounds),
            "first_token_seconds": statistics.median(
                itertools.chain.from_iterable(one.first_token_seconds for one in rounds)
            ),
        }
        for kind, rounds in found.items()
    }
    apart, together = medians[APART], medians[TOGETHER]
    return {
        "memory_ratio": round(apart["held_bytes"] / together["held_bytes"], 3),
        "first_token_ratio": round(apart["first_token_seconds"] / together["first_token_seconds"], 3),
        **medians,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    parser = argparse.ArgumentParser(
        description="Compare what a model in a process of its own takes with one in the worker's.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.fast:
            found = in_turns(tiny_model(folder / "tiny", made_up_records(24)), folder / "home", FAST, 1)
        else:
            model = arguments.model or demo_model()
            found = in_turns(model, folder / "home", SIZE, arguments.rounds)
    summary = summary_of(found)
    if not arguments.fast:
        RESULTS.write_text(json.dumps({"machine": surroundings(), **summary}, indent=2) + "\n")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
