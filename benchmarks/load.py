"""How a service behaves when more is asked than it can do, and when many watch one thing.

    python benchmarks/load.py             # 1x, 2x and 4x of what is sustainable, 500 watchers, uploads; prints JSON,
                                          # which it keeps in benchmarks/results/load.json
    python benchmarks/load.py --fast      # the same in seconds, with smaller numbers

A Data service is started as a process of its own in an empty home; this process is the only generator. What is
sustainable is measured first, with four calls at a time. At a multiple of it calls are sent when they are due,
answered or not. `admitted` are calls that were answered OK, `refused` those that got RESOURCE_EXHAUSTED with a time
to come back; anything else is counted under its code. Times are in milliseconds, as the generator sees them:
when it falls behind its own schedule, `late_ms_p99` says so. `floor` is a server that only refuses
(`load_floor.py`). Uploads are files of random bytes, one after the other, sent by the SDK from hashing to the
service's word that all is stored; a MB is 10^6 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from load_floor import floor

from luthier.client import AsyncClient, ConfigArguments
from luthier.v1 import data_service_pb2, data_service_pb2_grpc, dataset_pb2, event_pb2, upload_pb2
from luthier.worker.v1 import task_pb2, worker_service_pb2, worker_service_pb2_grpc

PARENT = "projects/default"
PARTS = ("overload", "watchers", "uploads")
RESULTS = Path(__file__).with_name("results") / "load.json"
DETAILS = "grpc-status-details-bin"
Call = Callable[["Line"], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to do."""

    seconds: float = 8.0
    multiples: tuple[float, ...] = (1.0, 2.0, 4.0)
    num_datasets: int = 200
    num_channels: int = 8
    num_watchers: int = 500
    events_per_second: float = 10.0
    num_uploads: int = 3
    upload_bytes: int = 1 << 30


FAST = Plan(
    seconds=1.0,
    multiples=(1.0, 4.0),
    num_datasets=20,
    num_watchers=40,
    num_channels=2,
    num_uploads=2,
    upload_bytes=1 << 24,
)


class Line:
    """One channel to the service, with a key."""

    def __init__(self, channel: aio.Channel, home: Path) -> None:
        self.data: Any = data_service_pb2_grpc.DataServiceStub(channel)
        self.worker: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self.key = (("authorization", f"Bearer {(home / 'api-key').read_text().strip()}"),)
        self.worker_key = (("authorization", f"Bearer {(home / 'worker-key').read_text().strip()}"),)


async def get_dataset(line: Line) -> None:
    """Read one dataset."""
    request = data_service_pb2.GetDatasetRequest(name=f"{PARENT}/datasets/d0")
    await line.data.GetDataset(request, metadata=line.key, timeout=30)


async def list_datasets(line: Line) -> None:
    """Read a page of fifty."""
    request = data_service_pb2.ListDatasetsRequest(parent=PARENT, page_size=50)
    await line.data.ListDatasets(request, metadata=line.key, timeout=30)


async def create_dataset(line: Line) -> None:
    """Write one dataset under a new name."""
    request = data_service_pb2.CreateDatasetRequest(parent=PARENT, request_id=str(uuid.uuid4()))
    request.dataset_id = f"n{uuid.uuid4().hex}"
    await line.data.CreateDataset(request, metadata=line.key, timeout=30)


CALLS: dict[str, Call] = {
    "GetDataset": get_dataset,
    "ListDatasets": list_datasets,
    "CreateDataset": create_dataset,
}


@dataclass(slots=True)
class Seen:
    """What came of calls: seconds of each, and codes of those that are neither admitted nor refused."""

    admitted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    async def of(self, call: Call, line: Line) -> None:
        """Make a call and sort it in."""
        began = time.perf_counter()
        try:
            await call(line)
        except aio.AioRpcError as error:
            exhausted = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if exhausted and b"RetryInfo" in dict(error.trailing_metadata() or ()).get(DETAILS, b""):
                self.refused.append(time.perf_counter() - began)
            else:
                self.others[error.code().name] += 1
        else:
            self.admitted.append(time.perf_counter() - began)


def quantile_ms(seconds: list[float], share: float) -> float | None:
    """Return a quantile in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    return round(ordered[int(share * (len(ordered) - 1))] * 1000, 1) if ordered else None


async def sustainable(call: Call, lines: list[Line], seconds: float) -> float:
    """Return calls a second with four at a time."""
    seen, until = Seen(), time.perf_counter() + seconds

    async def repeat(line: Line) -> None:
        while time.perf_counter() < until:
            await seen.of(call, line)

    await asyncio.gather(*(repeat(lines[place % len(lines)]) for place in range(4)))
    return len(seen.admitted) / seconds


async def offered(call: Call, lines: list[Line], rate: float, seconds: float) -> dict[str, Any]:
    """Send calls at a rate, and say what came of them."""
    seen, tasks, began = Seen(), set[asyncio.Task[None]](), time.perf_counter()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        ahead = due - time.perf_counter()
        if ahead > 0.001:
            await asyncio.sleep(ahead)
        seen.late.append(max(0.0, time.perf_counter() - due))
        tasks.add(asyncio.create_task(seen.of(call, lines[number % len(lines)])))
        if number % 20 == 0:
            await asyncio.sleep(0)
    spent = time.perf_counter() - began
    await asyncio.wait(tasks)
    return {
        "offered_per_second": round(len(tasks) / spent, 1),
        "admitted_per_second": round(len(seen.admitted) / spent, 1),
        "admitted_ms_p50": quantile_ms(seen.admitted, 0.5),
        "admitted_ms_p99": quantile_ms(seen.admitted, 0.99),
        "refused": len(seen.refused),
        "refused_ms_p50": quantile_ms(seen.refused, 0.5),
        "refused_ms_p99": quantile_ms(seen.refused, 0.99),
        "late_ms_p99": quantile_ms(seen.late, 0.99),
        "others": dict(seen.others),
    }


async def overload(lines: list[Line], home: Path, plan: Plan) -> dict[str, Any]:
    """Measure every kind of call at every multiple of what is sustainable, and after; and the largest on the floor."""
    result: dict[str, Any] = {}
    for name, call in CALLS.items():
        rate = await sustainable(call, lines, plan.seconds / 2)
        result[name] = {"sustainable_per_second": round(rate, 1)}
        for multiple in plan.multiples:
            result[name][f"{multiple:g}x"] = await offered(call, lines, multiple * rate, plan.seconds)
        result[name]["after"] = await offered(call, lines, rate / 2, 1.0)
    most = max(plan.multiples) * max(found["sustainable_per_second"] for found in result.values())
    async with floor() as address, lines_to(address, home, plan) as others:
        result["floor"] = await offered(get_dataset, others, most, plan.seconds)
    return result


async def watched_version(line: Line) -> tuple[str, task_pb2.Task]:
    """Make a dataset version whose task is leased to nobody but this process; return its name and task."""
    upload = await line.data.StartUpload(
        data_service_pb2.StartUploadRequest(
            parent=PARENT, upload=upload_pb2.Upload(filename="a.jsonl", size_bytes=3)
        ),
        metadata=line.key,
    )
    data = b"{}\n"
    chunk = data_service_pb2.WriteUploadRequest(
        name=upload.name, data=data, crc32=zlib.crc32(data), finish=True
    )
    await line.data.WriteUpload(iter([chunk]), metadata=line.key)
    sources = [dataset_pb2.DatasetSource(upload=upload.name)]
    version = await line.data.CreateDatasetVersion(
        data_service_pb2.CreateDatasetVersionRequest(
            parent=f"{PARENT}/datasets/d0", dataset_version=dataset_pb2.DatasetVersion(sources=sources)
        ),
        metadata=line.key,
    )
    register = worker_service_pb2.RegisterWorkerRequest(
        worker="load", instance="load", kinds=[task_pb2.TASK_KIND_BUILD_VERSION]
    )
    await line.worker.RegisterWorker(register, metadata=line.worker_key)
    claim = worker_service_pb2.ClaimTaskRequest(worker="load", wait_seconds=10)
    claimed = await line.worker.ClaimTask(claim, metadata=line.worker_key)
    return version.name, claimed.task


@dataclass(slots=True)
class Watched:
    """What watchers of one task learnt: seconds from each event's report to its coming, and how streams broke."""

    name: str
    total: int
    lags: list[float] = field(default_factory=list)
    breaks: Counter[str] = field(default_factory=Counter)

    async def watch(self, line: Line) -> int:
        """Watch until every event has come; returns how many did."""
        seen = last = 0
        request = data_service_pb2.WatchDatasetVersionRequest(name=self.name)
        call = line.data.WatchDatasetVersion(request, metadata=line.key)
        try:
            async for event in call:
                if event.HasField("heartbeat"):
                    continue
                self.breaks["GAP"] += event.sequence != last + 1
                last = event.sequence
                if event.HasField("log"):
                    self.lags.append(time.monotonic() - float(event.log.text))
                    seen += 1
                if seen == self.total:
                    break
        except aio.AioRpcError as error:
            self.breaks[error.code().name] += 1
        finally:
            call.cancel()
        return seen


async def report(line: Line, task: task_pb2.Task, number: int) -> None:
    """Report one event of a task, which says when it was reported."""
    text = repr(time.monotonic())
    event = event_pb2.Event(log=event_pb2.LogLine(severity=event_pb2.LogLine.SEVERITY_INFO, text=text))
    local = worker_service_pb2.LocalEvent(local_number=number, event=event)
    request = worker_service_pb2.ReportEventsRequest(task=task.task, epoch=task.epoch, events=[local])
    await line.worker.ReportEvents(request, metadata=line.worker_key, timeout=60)


async def watching(lines: list[Line], plan: Plan) -> dict[str, Any]:
    """Let many watch one running task, report its events at a rate, and say how late each watcher learnt of each."""
    name, task = await watched_version(lines[0])
    watched = Watched(name, int(plan.events_per_second * plan.seconds))
    watchers = [
        asyncio.create_task(watched.watch(lines[number % len(lines)])) for number in range(plan.num_watchers)
    ]
    await asyncio.sleep(plan.seconds / 2)
    for number in range(watched.total):
        await report(lines[0], task, number + 1)
        await asyncio.sleep(1 / plan.events_per_second)
    done, late = await asyncio.wait(watchers, timeout=60)
    for watcher in late:
        watcher.cancel()
    return {
        "watchers": plan.num_watchers,
        "events": watched.total,
        "complete": sum(watcher.result() == watched.total for watcher in done),
        "lag_ms_p50": quantile_ms(watched.lags, 0.5),
        "lag_ms_p99": quantile_ms(watched.lags, 0.99),
        "breaks": {kind: count for kind, count in watched.breaks.items() if count},
    }


async def uploading(address: str, home: Path, plan: Plan) -> dict[str, Any]:
    """Send files of random bytes, one after the other."""
    file = home / "random.jsonl"
    await asyncio.to_thread(file.write_bytes, os.urandom(plan.upload_bytes))
    rates = []
    async with AsyncClient(ConfigArguments(home=home, data_address=address)) as client:
        for _ in range(plan.num_uploads):
            began = time.perf_counter()
            sent = await client.datasets.upload(file)
            assert sent.persisted_size_bytes == plan.upload_bytes
            rates.append(round(plan.upload_bytes / 1e6 / (time.perf_counter() - began), 1))
    return {
        "bytes": plan.upload_bytes,
        "mb_per_second": rates,
        "mb_per_second_p50": statistics.median(rates),
    }


@asynccontextmanager
async def service(home: Path) -> AsyncIterator[tuple[str, int]]:
    """Run a Data service in a home; yields its address and process id."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        address, metrics = (f"127.0.0.1:{one.getsockname()[1]}" for one in (probe, other))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    settings = {
        "LUTHIER_HOME": str(home),
        "LUTHIER_DATA_ADDRESS": address,
        "LUTHIER_DATA_METRICS_ADDRESS": metrics,
    }
    with (home / "data.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "luthier.data", env=clean | settings, stdout=log, stderr=log
        )
    try:
        # By default gRPC tries again after a second, and then after longer ones.
        at_once = [("grpc.max_reconnect_backoff_ms", 100)]
        async with aio.insecure_channel(address, at_once) as channel:
            check: Any = health_pb2_grpc.HealthStub(channel)
            await check.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
        yield address, process.pid
    finally:
        process.terminate()
        await process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def lines_to(address: str, home: Path, plan: Plan) -> AsyncIterator[list[Line]]:
    """Open connections to a service."""
    # Channels of one process share a connection unless told not to.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [aio.insecure_channel(address, options=options) for _ in range(plan.num_channels)]
    try:
        yield [Line(channel, home) for channel in channels]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def fill(line: Line, plan: Plan) -> None:
    """Create datasets to read."""
    for number in range(plan.num_datasets):
        request = data_service_pb2.CreateDatasetRequest(parent=PARENT, dataset_id=f"d{number}")
        await line.data.CreateDataset(request, metadata=line.key)


async def measured(plan: Plan, parts: tuple[str, ...]) -> dict[str, Any]:
    """Start a service, measure, stop it."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        async with service(home) as (address, pid), lines_to(address, home, plan) as lines:
            await fill(lines[0], plan)
            measures: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
                "overload": partial(overload, lines, home, plan),
                "watchers": partial(watching, lines, plan),
                "uploads": partial(uploading, address, home, plan),
            }
            for part in parts:
                spent, began = cpu_seconds(pid), time.perf_counter()
                result[part] = await measures[part]()
                share = (cpu_seconds(pid) - spent) / (time.perf_counter() - began)
                result[part]["service_cpu_share"] = round(share, 2)
    return result


def main() -> None:
    """Measure, print, and keep what a whole run found."""
    parser = argparse.ArgumentParser(description="Overload, many watchers and uploads, on one service.")
    parser.add_argument("--fast", action="store_true", help="small numbers, for a test")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    arguments = parser.parse_args()
    parts = (arguments.only,) if arguments.only else PARTS
    gc.freeze()  # a full search for garbage stands still for as long as some calls take
    text = json.dumps(asyncio.run(measured(FAST if arguments.fast else Plan(), parts)), indent=1)
    if parts == PARTS and not arguments.fast:
        RESULTS.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
