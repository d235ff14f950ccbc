"""How many small calls a second a service answers, by one or by two builds of Luthier in one run.

    python benchmarks/unary_calls.py                                          # this build
    python benchmarks/unary_calls.py --side before=/old/.venv/bin/python --side after=.venv/bin/python

Each side serves a copy of the same recorded home (tests/golden). Calls are sent when they are due, answered or not; the
rate rises by a fifth until the 99th percentile passes 50 ms or a call is refused, and the last rate before counts. The
sides take turns, several times; medians and ratios to the first side are printed as JSON, with the processor time that
the service spends on a call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from luthier.v1 import (
    data_service_pb2,
    data_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)

ROOT = Path(__file__).parents[1]
PARENT = "projects/default"
P99_SECONDS = 0.050
_STEP = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to do."""

    num_datasets: int = 1000
    seconds: float = 2.0
    repeats: int = 5
    start_rate: float = 40.0
    max_rate: float = 4000.0


FAST = Plan(num_datasets=60, seconds=0.3, repeats=1, start_rate=10.0, max_rate=15.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running service: its channel, the metadata of calls, its process, and the address of its metrics."""

    channel: aio.Channel
    metadata: tuple[tuple[str, str], ...]
    pid: int
    metrics: str

    def cpu_seconds(self) -> float:
        """Return the processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


Call = Callable[[Service], Awaitable[Any]]


async def get_job(service: Service) -> None:
    """Read one job, with its run record and metrics."""
    stub: Any = training_service_pb2_grpc.TrainingServiceStub(service.channel)
    request = training_service_pb2.GetFineTuningJobRequest(name=f"{PARENT}/fineTuningJobs/outlived")
    await stub.GetFineTuningJob(request, metadata=service.metadata, timeout=30)


async def list_datasets(service: Service) -> None:
    """Read a page of fifty datasets."""
    stub: Any = data_service_pb2_grpc.DataServiceStub(service.channel)
    request = data_service_pb2.ListDatasetsRequest(parent=PARENT, page_size=50)
    await stub.ListDatasets(request, metadata=service.metadata, timeout=30)


async def create_dataset(service: Service) -> None:
    """Write one dataset under a name of its own."""
    stub: Any = data_service_pb2_grpc.DataServiceStub(service.channel)
    await stub.CreateDataset(
        data_service_pb2.CreateDatasetRequest(parent=PARENT), metadata=service.metadata, timeout=30
    )


CALLS: dict[str, tuple[str, Call]] = {
    "GetFineTuningJob": ("training", get_job),
    "ListDatasets": ("data", list_datasets),
}


async def answered(call: Call, service: Service, rate: float, seconds: float) -> tuple[float, int]:
    """Send calls at a rate; return the 99th percentile of those that were answered, and how many were not."""
    taken: list[float] = []
    failures = 0

    async def one() -> None:
        nonlocal failures
        began = time.perf_counter()
        try:
            await call(service)
            taken.append(time.perf_counter() - began)
        except aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            failures += 1

    tasks, began = [], time.perf_counter()
    for number in range(max(1, int(rate * seconds))):
        ahead = began + number / rate - time.perf_counter()
        if ahead > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(one()))
    await asyncio.gather(*tasks)
    taken.sort()
    return (taken[int(0.99 * (len(taken) - 1))] if taken else float("inf")), failures


async def sustained(call: Call, service: Service, plan: Plan) -> tuple[float, float]:
    """Return the greatest rate that was answered in time, 0 for none, and the CPU milliseconds of a call at it."""
    rate, best, cpu_ms = plan.start_rate, 0.0, 0.0
    while rate <= plan.max_rate:
        spent = service.cpu_seconds()
        p99, failures = await answered(call, service, rate, plan.seconds)
        if failures or p99 > P99_SECONDS:
            break
        best = rate
        cpu_ms = (service.cpu_seconds() - spent) / max(1, int(rate * plan.seconds)) * 1000
        rate *= _STEP
        await asyncio.sleep(0.2)
    return best, cpu_ms


@asynccontextmanager
async def serving(
    python: str, name: str, home: Path, more: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[Service]:
    """Run a service of a build on a home; `more`: further variables of its environment."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        address, metrics = (f"127.0.0.1:{one.getsockname()[1]}" for one in (probe, other))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LUTHIER_")}
    settings = {
        "LUTHIER_HOME": str(home),
        "LUTHIER_PROJECTS": "default,other",
        f"LUTHIER_{name.upper()}_ADDRESS": address,
        f"LUTHIER_{name.upper()}_METRICS_ADDRESS": metrics,
    }
    with (home / f"{name}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            python,
            "-m",
            f"luthier.{name}",
            env={**clean, **settings, **more},
            stdout=log,
            stderr=log,
            cwd=home,
        )
    try:
        # By default gRPC tries again after a second, and then after longer ones.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100)]
        async with aio.insecure_channel(address, options=options) as channel:
            check: Any = health_pb2_grpc.HealthStub(channel)
            await check.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=120)
            key = (home / "api-key").read_text().strip()
            sent = (("authorization", f"Bearer {key}"),)
            yield Service(channel=channel, metadata=sent, pid=process.pid, metrics=metrics)
    finally:
        process.terminate()
        await process.wait()


async def measured(sides: dict[str, str], folder: Path, plan: Plan) -> dict[str, Any]:
    """Serve a copy of the home for each side, and let them take turns."""
    turns = [(call, side) for _ in range(plan.repeats) for call in CALLS for side in sides]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {turn: [] for turn in turns}
    async with AsyncExitStack() as stack:
        services: dict[tuple[str, str], Service] = {}
        for side, python in sides.items():
            home = folder / side
            shutil.copytree(folder / "home", home, symlinks=True)
            for name in ("data", "training"):
                services[side, name] = await stack.enter_async_context(serving(python, name, home))
            for _ in range(plan.num_datasets):
                await create_dataset(services[side, "data"])
        for call, side in turns:
            name, send = CALLS[call]
            found[call, side].append(await sustained(send, services[side, name], plan))
    return {call: summed_up({side: found[call, side] for side in sides}) for call in CALLS}


def summed_up(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return the medians of each side, and its ratio to the first."""
    rates = {side: statistics.median(rate for rate, _ in seen) for side, seen in found.items()}
    first = next(iter(rates.values()))
    return {
        side: {
            "per_second": round(rates[side], 1),
            "ratio": round(rates[side] / first, 2) if first else None,
            "service_cpu_ms": round(statistics.median(cpu for _, cpu in seen), 2),
        }
        for side, seen in found.items()
    }


def run(sides: dict[str, str], plan: Plan, recorded: str = "") -> dict[str, Any]:
    """Measure on a recorded home, the newest unless named: an older build opens none of a newer one."""
    sys.path.insert(0, str(ROOT))
    from tests.golden.home_files import unpack_home

    homes = ROOT / "tests" / "golden" / "homes"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir(mode=0o700)
        unpack_home(homes / recorded if recorded else max(homes.iterdir()), home)
        return asyncio.run(measured(sides, Path(folder), plan))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Small calls a second at a 99th percentile of 50 ms.")
    parser.add_argument("--fast", action="store_true", help="small numbers, for a test")
    parser.add_argument("--repeats", type=int, default=Plan().repeats, help="turns of each side")
    parser.add_argument("--home", default="", help="a folder of tests/golden/homes; the newest unless named")
    parser.add_argument(
        "--side", action="append", metavar="NAME=PYTHON", help="a build, by the Python that has it"
    )
    chosen = parser.parse_args(arguments)
    sides = dict(side.split("=", 1) for side in chosen.side or [f"this={sys.executable}"])
    print(
        json.dumps(run(sides, FAST if chosen.fast else Plan(repeats=chosen.repeats), chosen.home), indent=1)
    )


if __name__ == "__main__":
    main()
