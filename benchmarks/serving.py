"""Answering as evaluations and GenerateText do, on a CPU: ours against transformers, and requests that come one by one.

`python benchmarks/serving.py` has three parts. Two hundred prompts behind the same three examples are answered greedily
by 48 tokens each: ours as an evaluation asks, 64 rows at a time behind one prefix, transformers' generate in padded
batches of two sizes. Then 32 requests of differing lengths arrive over 10 s: admitted as they come, or one batch after
another, each of all that have come by then. Then `serving_first_token.py` asks real services for a first token. The
contenders take turns, each in a process of its own. It writes results/serving.json and ends with one line of JSON:

    evaluate_vs_transformers  our tokens per second by those of transformers' fastest setting
    evaluate_rss_ratio        the most memory that ours held by what that setting held
    first_token_idle,         time to the first piece of GenerateText by that of the bare model reading the prompt;
    first_token_busy          while nothing else runs, and while an evaluation does
    continuous_latency_ratio  mean latency of requests admitted as they come by that of one batch after another

`--fast` is a smoke run on a tiny random model; it writes no results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from child_process import Measured
from serving_first_token import FAST, SIZE, measure
from sft_step import made_up_records, surroundings
from transformers import AutoModelForCausalLM
from turns import OURS, Contender, DrawTask, child, in_turns, make_task, timed, with_shots

from luthier.evaluation.shares import ROWS_A_BATCH
from luthier.lm.engine import Engine
from luthier.lm.generate import GenerationRequest
from luthier.lm.load import load_model

RESULTS = Path(__file__).parent / "results"
FIGURES = (
    "evaluate_vs_transformers",
    "evaluate_rss_ratio",
    "first_token_idle",
    "first_token_busy",
    "continuous_latency_ratio",
)
"""What releases are compared by."""
NUM_PROMPTS = 200
NUM_SHOTS = 3
NUM_ARRIVALS = 32
ARRIVAL_SECONDS = 10.0
_LONGEST_ANSWER = 128


def evaluate_ours(task: DrawTask) -> Measured:
    """Answer all prompts as an evaluation asks for them."""
    engine = Engine(load_model(task.model))
    shared = task.prompts[0][: task.num_shared]
    own = tuple(prompt[task.num_shared :] for prompt in task.prompts)

    def answer(_: int) -> int:
        num_tokens = 0
        for first in range(0, len(own), ROWS_A_BATCH):
            rows = own[first : first + ROWS_A_BATCH]
            engine.submit(
                GenerationRequest(
                    request_id="rows", prompts=rows, shared_prefix=shared, max_new_tokens=task.new_tokens
                )
            )
            while engine.wait(0):
                num_tokens += sum(len(event.token_ids) for event in engine.step())
            _require_no_failure(engine)
        return num_tokens

    # None before the first one: an evaluation answers once.
    return timed(task.num_steps, answer)


def evaluate_transformers(task: DrawTask, dtype: str, rows: int) -> Measured:
    """Answer all prompts by `generate`, in batches that are padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(
        task.model, dtype=getattr(torch, dtype), local_files_only=True
    )
    model.train(mode=False)

    def answer(_: int) -> int:
        num_tokens = 0
        for first in range(0, len(task.prompts), rows):
            batch = task.prompts[first : first + rows]
            width = max(map(len, batch))
            with torch.inference_mode():
                drawn = model.generate(
                    input_ids=torch.tensor([[0] * (width - len(row)) + list(row) for row in batch]),
                    attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch]),
                    do_sample=False,
                    min_new_tokens=task.new_tokens,
                    max_new_tokens=task.new_tokens,
                    pad_token_id=0,
                )
            num_tokens += int(drawn.shape[0] * (drawn.shape[1] - width))
        return num_tokens

    # None before the first one: an evaluation answers once.
    return timed(task.num_steps, answer)


def _require_no_failure(engine: Engine) -> None:
    for error in engine.take_failures().values():
        raise error


class Arrival(NamedTuple):
    """A request: its number in the order of coming, when it comes in seconds, its prompt, and tokens of its answer."""

    number: int
    at: float
    prompt: tuple[int, ...]
    new_tokens: int


def arrivals(task: DrawTask) -> list[Arrival]:
    """Return the requests in the order in which they come; always the same."""
    draw = random.Random(3)
    times = sorted(draw.uniform(0, ARRIVAL_SECONDS * task.num_steps) for _ in task.prompts)
    longest = min(_LONGEST_ANSWER, 8 * task.new_tokens)
    return [
        Arrival(number, at, prompt, draw.randint(8, longest))
        for number, (at, prompt) in enumerate(zip(times, task.prompts, strict=True))
    ]


def serve_continuously(task: DrawTask) -> Measured:
    """Admit each request when it comes."""

    def admit(engine: Engine, come: Sequence[Arrival]) -> None:
        for one in come:
            engine.submit(_request(one.number, (one.prompt,), one.new_tokens))

    return _served(task, admit, is_batched=False)


def serve_in_batches(task: DrawTask) -> Measured:
    """Admit what has come only when nothing is answered, as one batch that goes on until its longest answer ends."""

    def admit(engine: Engine, come: Sequence[Arrival]) -> None:
        longest = max(one.new_tokens for one in come)
        engine.submit(_request(come[0].number, tuple(one.prompt for one in come), longest))

    return _served(task, admit, is_batched=True)


def _request(number: int, prompts: tuple[tuple[int, ...], ...], new_tokens: int) -> GenerationRequest:
    return GenerationRequest(request_id=str(number), prompts=prompts, max_new_tokens=new_tokens)


def _served(
    task: DrawTask, admit: Callable[[Engine, Sequence[Arrival]], None], *, is_batched: bool
) -> Measured:
    """Answer all that come; an answer has ended with the last token that was asked for."""
    engine = Engine(load_model(task.model))
    engine.submit(_request(0, task.prompts[:1], 2))
    while engine.wait(0):
        engine.step()
    waiting = arrivals(task)
    every, began, latencies = list(waiting), time.perf_counter(), dict[int, float]()
    while len(latencies) < len(every):
        now = time.perf_counter() - began
        if not is_batched or not engine.wait(0):
            come = [one for one in waiting if one.at <= now]
            waiting = waiting[len(come) :]
            if come:
                admit(engine, come)
        for event in engine.step():
            one = every[int(event.request_id) + event.row]
            if event.num_generated == one.new_tokens:
                latencies[one.number] = time.perf_counter() - began - one.at
        _require_no_failure(engine)
        if not engine.wait(0) and waiting:
            time.sleep(max(0.0, waiting[0].at - (time.perf_counter() - began)))
    return {
        "mean_latency_seconds": statistics.mean(latencies.values()),
        "largest_latency_seconds": max(latencies.values()),
        "tokens": sum(one.new_tokens for one in every),
        "threads": torch.get_num_threads(),
    }


EVALUATING: dict[str, Contender] = {
    OURS: Contender(run=evaluate_ours, configuration="our engine: bf16, 64 rows behind one prefix, greedy"),
    **{
        f"transformers_{dtype}_{rows}": Contender(
            run=partial(evaluate_transformers, dtype=dtype, rows=rows),
            configuration=f"transformers generate, {dtype}, padded batches of {rows}, greedy",
        )
        for dtype, rows in (("bfloat16", 16), ("bfloat16", 64), ("float32", 16), ("float32", 64))
    },
}
SERVING: dict[str, Contender] = {
    "continuous": Contender(run=serve_continuously, configuration="requests join and leave between passes"),
    "batches": Contender(
        run=serve_in_batches, configuration="one batch after another, of all that have come"
    ),
}


def summary_of(
    evaluated: Mapping[str, Sequence[Measured]], served: Mapping[str, Sequence[Measured]]
) -> dict[str, Any]:
    """Medians by contender, and the figures that releases are compared by; None without both sides."""
    done = {name: runs for name, runs in evaluated.items() if runs and "error" not in runs[0]}
    speeds = {
        name: statistics.median(sum(one["tokens"]) / sum(one["seconds"]) for one in runs)
        for name, runs in done.items()
    }
    memory = {name: statistics.median(one["peak_rss_bytes"] for one in runs) for name, runs in done.items()}
    best = max((name for name in speeds if name != OURS), key=lambda name: speeds[name], default=None)
    latency = {
        name: statistics.median(one["mean_latency_seconds"] for one in runs)
        for name, runs in served.items()
        if runs and "error" not in runs[0]
    }
    is_compared = best is not None and OURS in speeds
    return {
        "evaluate_vs_transformers": round(speeds[OURS] / speeds[best], 3) if is_compared and best else None,
        "evaluate_rss_ratio": round(memory[OURS] / memory[best], 3) if is_compared and best else None,
        "continuous_latency_ratio": (
            round(latency["continuous"] / latency["batches"], 3) if latency.keys() == SERVING.keys() else None
        ),
        "best_setting": best,
        "tokens_per_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "mean_latency_seconds": {name: round(seconds, 3) for name, seconds in latency.items()},
    }


def measured(model: Path | None, repeats: int, *, fast: bool) -> tuple[dict[str, Any], bool]:
    """Measure all three parts and write the results; return the summary, and whether our own side failed.

    `model`: a folder; None: the demo's base model. `fast` is a smoke run, which writes nothing.
    """
    counts = (6, 4) if fast else (NUM_PROMPTS, NUM_ARRIVALS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"num_samples": 1, "new_tokens": 4 if fast else 48, "num_steps": 1}
        task = make_task(folder, counts[0], model=model, fast=fast, **sizes)
        shot = with_shots(task, made_up_records(NUM_SHOTS))
        shot.save(folder / "evaluate.json")
        replace(task, prompts=task.prompts[: counts[1]]).save(folder / "serve.json")
        script = Path(__file__)
        evaluated = in_turns(script, folder / "evaluate.json", EVALUATING, repeats)
        served = in_turns(script, folder / "serve.json", SERVING, repeats)
        first = measure(task.model, folder / "home", FAST if fast else SIZE)
    summary = summary_of(evaluated, served) | first.summary()
    if not fast:
        configurations = {name: one.configuration for name, one in (EVALUATING | SERVING).items()}
        document = {"machine": surroundings(), "evaluated": evaluated, "served": served}
        document |= {"first_token": first.details(), "configurations": configurations, **summary}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "serving.json").write_text(json.dumps(document, indent=2) + "\n")
    return summary, "error" in evaluated[OURS][0] or "error" in served["continuous"][0]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--child"]:
        return child(given[1:], EVALUATING | SERVING)
    parser = argparse.ArgumentParser(description="Time answering against transformers' generate.")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's base model)")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a tiny random model")
    arguments = parser.parse_args(given)
    summary, has_failed = measured(arguments.model, arguments.repeats, fast=arguments.fast)
    print(json.dumps(summary))
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
