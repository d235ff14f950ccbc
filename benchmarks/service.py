"""What metrics and traces cost: small calls and training steps with them on, against the same build without.

    python benchmarks/service.py             # calls, then steps; the last line is JSON
    python benchmarks/service.py --fast      # small numbers, for a test
    python benchmarks/service.py --only calls

Sides: `off` (every counter, clock and observer does nothing: benchmarks/unmeasured), `metrics` (as Luthier runs, its
page read once a turn), `traces` (that, and every trace, which is what an address alone asks for, is sent to a receiver
of OTLP, a process that throws them away), and for calls `traces_tenth` (LUTHIER_TRACES_SHARE=0.1: one trace in ten is
kept and sent; a job is one trace, kept or not, so that its steps have no tenth). All sides run at once, idle but for
the one whose turn it is; they take turns in an order that rotates, and each figure is the median over turns of a
side's ratio to `off` in the same turn. What is promised: p50 and throughput within 5 %, a step within 1 %. The
receiver takes processor time of this machine, which elsewhere it would not.

calls: each of three calls one after the other (p50), then four at a time (throughput), on a copy of a recorded home.
steps: tokens a second of each step of one job, the same rows on every side, the first steps left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from service_processes import WAIT_SECONDS, Stack, running
from unary_calls import CALLS as READING
from unary_calls import Call, Service, create_dataset, serving

from luthier.client import Client
from luthier.v1.dataset_pb2 import DatasetSource
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, Hyperparameters, LoraConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

ROOT = Path(__file__).parents[1]
SIDES = {
    "calls": ("off", "metrics", "traces", "traces_tenth"),
    "steps": ("off", "metrics", "traces"),
}
CALLS: dict[str, tuple[str, Call]] = {**READING, "CreateDataset": ("data", create_dataset)}
RESULTS = Path(__file__).with_name("results") / "service.json"
IN_FLIGHT = 4
_PAUSE_SECONDS = 0.01
PROMISED = {"p50": 1.05, "throughput": 1 / 1.05, "step": 1.01}
_SINK = """
import sys, grpc
from concurrent.futures import ThreadPoolExecutor
class Sink(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
server = grpc.server(ThreadPoolExecutor(2))
server.add_generic_rpc_handlers((Sink(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to do.

    Attributes:
        turns: of each side.
        calls: one after the other, in a turn.
        seconds: of calls at a time, in a turn.
        steps: of a job, in a turn.
        left_out: of them, the first.
        shape: of the model that is trained.
    """

    turns: int = 12
    calls: int = 300
    seconds: float = 3.0
    steps: int = 30
    left_out: int = 5
    shape: Mapping[str, int]


FULL = Plan(
    shape={
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
)
FAST = Plan(turns=1, calls=5, seconds=0.2, steps=3, left_out=1, shape={})


@contextmanager
def sink() -> Iterator[str]:
    """Run a receiver of traces that throws them away; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SINK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.communicate("")


def settings_of(side: str, receiver: str) -> dict[str, str]:
    """Return what is set in the environment of a side's processes."""
    if side == "off":
        return {"PYTHONPATH": str(ROOT / "benchmarks" / "unmeasured")}
    if side == "metrics":
        return {}
    share = {"LUTHIER_TRACES_SHARE": "0.1"} if side == "traces_tenth" else {}
    return {"LUTHIER_TRACES_ADDRESS": receiver, **share}


def turns_of(sides: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    """Yield the sides in an order that rotates, so that none is always first."""
    for turn in range(count):
        place = turn % len(sides)
        yield (*sides[place:], *sides[:place])


async def called(call: Call, service: Service, plan: Plan) -> dict[str, float]:
    """Return the median milliseconds of calls one after the other, and calls a second of several at a time.

    Calls that the service refuses as too many are no answers: they are counted apart, and made again soon.
    """
    taken = []
    for _ in range(plan.calls):
        began = time.perf_counter()
        await call(service)
        taken.append(time.perf_counter() - began)
    count, refused, began = 0, 0, time.perf_counter()

    async def repeat() -> None:
        nonlocal count, refused
        while time.perf_counter() - began < plan.seconds:
            try:
                await call(service)
                count += 1
            except aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                refused += 1
                await asyncio.sleep(_PAUSE_SECONDS)

    await asyncio.gather(*(repeat() for _ in range(IN_FLIGHT)))
    spent = time.perf_counter() - began
    return {
        "p50_ms": statistics.median(taken) * 1000,
        "per_second": max(count, 1) / spent,
        "refused": float(refused),
    }


async def scraped(service: Service) -> None:
    """Read a service's page of metrics, as Prometheus does now and then."""
    await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{service.metrics}/metrics").read())


async def turn_of(
    call: str, side: str, services: Mapping[tuple[str, str], Service], plan: Plan
) -> dict[str, float]:
    """Give a side its turn with a call; where there are metrics, somebody reads them first."""
    name, send = CALLS[call]
    if side != "off":
        await scraped(services[side, name])
    return await called(send, services[side, name], plan)


async def calls(folder: Path, plan: Plan, receiver: str) -> dict[str, Any]:
    """Serve a copy of a recorded home for each side, and let them take turns."""
    sys.path.insert(0, str(ROOT))
    from tests.golden.home_files import unpack_home

    recorded = folder / "recorded"
    recorded.mkdir(mode=0o700)
    unpack_home(max((ROOT / "tests" / "golden" / "homes").iterdir()), recorded)
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in CALLS}
    async with AsyncExitStack() as stack:
        services: dict[tuple[str, str], Service] = {}
        for side in SIDES["calls"]:
            shutil.copytree(recorded, home := folder / side, symlinks=True)
            for name in ("data", "training"):
                settings = settings_of(side, receiver)
                services[side, name] = await stack.enter_async_context(
                    serving(sys.executable, name, home, settings)
                )
        for order in turns_of(SIDES["calls"], plan.turns):
            for call in CALLS:
                found[call].append({side: await turn_of(call, side, services, plan) for side in order})
    measured: dict[str, Any] = {}
    for call, turns in found.items():
        measured[call] = compared(turns, SIDES["calls"], ("p50_ms", "per_second"))
        for side in SIDES["calls"]:
            measured[call][side]["refused"] = sum(turn[side]["refused"] for turn in turns)
    return measured


def prepared(stack: Stack, plan: Plan, folder: Path) -> str:
    """Register a model of the plan's shape and render rows for it; returns the rendering's name."""
    from tests.e2e.conftest import make_tiny_model, write_examples

    make_tiny_model(directory := stack.home / "models" / "m", **plan.shape)
    source = write_examples(folder / f"{stack.home.name}.jsonl", 256)
    with stack.client() as client:
        client.models.register_base(Model(directory=str(directory)), model_id="m")
        client.models.wait("m", timeout_seconds=WAIT_SECONDS)
        client.datasets.create("rows")
        upload = client.datasets.upload(source)
        version = client.datasets.create_version("rows", [DatasetSource(upload=upload.name)])
        client.datasets.versions.wait(version.name, timeout_seconds=WAIT_SECONDS)
        rendering = client.renderings.create(Rendering(dataset_version=version.name, model="m"))
        return client.renderings.wait(rendering.name, timeout_seconds=WAIT_SECONDS).name


def trained(client: Client, rendering: str, plan: Plan) -> list[float]:
    """Run one job; returns the tokens a second of its steps, the first left out."""
    job = FineTuningJob(
        base_model="m",
        rendering=rendering,
        lora=LoraConfig(rank=8),
        hyperparameters=Hyperparameters(num_epochs=1000, max_steps=plan.steps, batch_tokens=2048),
        checkpoint_interval_steps=plan.steps,
    )
    name = client.jobs.create(job).name
    client.jobs.wait(name, timeout_seconds=WAIT_SECONDS * 4)
    rates = [point.values["tokens_per_second"] for point in client.jobs.metrics(name)]
    assert len(rates) == plan.steps, f"{name} has {len(rates)} steps, {plan.steps} were asked for"
    return rates[plan.left_out :]


def steps(folder: Path, plan: Plan, receiver: str) -> dict[str, Any]:
    """Run services and workers for each side, and let them train in turns."""
    sys.path.insert(0, str(ROOT))
    found: list[dict[str, dict[str, float]]] = []
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(
                running(folder / side, "cpu", ("data", "training"), settings_of(side, receiver))
            )
            for side in SIDES["steps"]
        }
        clients = {side: stack.enter_context(one.client()) for side, one in sides.items()}
        renderings = {side: prepared(one, plan, folder) for side, one in sides.items()}
        for order in turns_of(SIDES["steps"], plan.turns):
            rates = {side: trained(clients[side], renderings[side], plan) for side in order}
            # Step by step, since rows differ in length from step to step and are the same on every side.
            found.append(
                {
                    side: {
                        "step_ratio": statistics.median(
                            off / on for off, on in zip(rates["off"], rates[side], strict=True)
                        ),
                        "tokens_per_second": statistics.median(rates[side]),
                    }
                    for side in SIDES["steps"]
                }
            )
    compared_steps = compared(found, SIDES["steps"], ("tokens_per_second",))
    for side in SIDES["steps"]:
        ratios = [turn[side]["step_ratio"] for turn in found]
        compared_steps[side]["step_ratio"] = summed_up(ratios)
    return compared_steps


def compared(
    turns: Sequence[Mapping[str, Mapping[str, float]]], sides: Sequence[str], figures: Sequence[str]
) -> dict[str, Any]:
    """Return of each side the median of each figure, and its ratio to `off` in the same turn."""
    return {
        side: {
            figure: {
                "median": round(statistics.median(turn[side][figure] for turn in turns), 3),
                "ratio": summed_up([turn[side][figure] / turn["off"][figure] for turn in turns]),
            }
            for figure in figures
        }
        for side in sides
    }


def summed_up(ratios: Sequence[float]) -> dict[str, float]:
    """Return the median of ratios, and the quartiles that tell how sure it is."""
    low, high = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else (min(ratios), max(ratios))
    return {"median": round(statistics.median(ratios), 4), "low": round(low, 4), "high": round(high, 4)}


def verdict(found: Mapping[str, Any]) -> dict[str, bool]:
    """Say of what was measured whether it is as promised, by side and figure: the worst of all calls."""
    said: dict[str, bool] = {}
    if "calls" in found:
        for side in SIDES["calls"][1:]:
            by_call = [call[side] for call in found["calls"].values()]
            said[f"{side} p50"] = all(one["p50_ms"]["ratio"]["median"] <= PROMISED["p50"] for one in by_call)
            said[f"{side} throughput"] = all(
                one["per_second"]["ratio"]["median"] >= PROMISED["throughput"] for one in by_call
            )
    if "steps" in found:
        for side in SIDES["steps"][1:]:
            said[f"{side} step"] = found["steps"][side]["step_ratio"]["median"] <= PROMISED["step"]
    return said


def run(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    """Measure some parts."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sink() as receiver:
        for part in parts:
            (inner := Path(folder) / part).mkdir()
            if part == "calls":
                found[part] = asyncio.run(calls(inner, plan, receiver))
            else:
                found[part] = steps(inner, plan, receiver)
            print(json.dumps({part: found[part]}, indent=1), file=sys.stderr)
    return {**found, "as_promised": verdict(found), "cores": os.cpu_count(), "turns": plan.turns}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description="What metrics and traces cost.")
    parser.add_argument("--fast", action="store_true", help="small numbers, for a test")
    parser.add_argument("--only", choices=("calls", "steps"), help="one part alone")
    chosen = parser.parse_args(arguments)
    parts = (chosen.only,) if chosen.only else ("calls", "steps")
    found = run(FAST if chosen.fast else FULL, parts)
    if len(parts) == 2 and not chosen.fast:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
