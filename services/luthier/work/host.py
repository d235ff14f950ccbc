"""Host one service: open its state, take up its queue, serve it with the worker protocol until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc.aio

from luthier.errors import ResourceExhausted
from luthier.runtime.auth import Authenticator, TaskTokens
from luthier.runtime.granted_keys import ALL_PROJECTS, GrantedKey, read_granted
from luthier.runtime.home import keep_private, secure_home
from luthier.runtime.keys import Keys, read_or_create_keys
from luthier.runtime.metrics import MetricsServer
from luthier.runtime.paging import PageTokens
from luthier.runtime.policies import Policy
from luthier.runtime.server import Registration, ServerOptions, require_free, serving, stop_signal
from luthier.runtime.tracing import traced
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.storage.disk import MIN_FREE_BYTES
from luthier.storage.migrations import upgrade
from luthier.storage.opening import Stores, StoreUrls, store_urls
from luthier.storage.staging import Staging
from luthier.work import schema
from luthier.work.collecting import (
    GRACE_SECONDS,
    LOOK_SECONDS,
    LOOSE_SECONDS,
    STRAY_SECONDS,
    CollectionMetrics,
    Collector,
    Patience,
)
from luthier.work.elsewhere import Elsewhere, GrpcKeeper, Keeper
from luthier.work.handlers import TaskHandler
from luthier.work.hold_servicer import POLICY as HOLD_POLICY
from luthier.work.hold_servicer import SERVICE as HOLD_SERVICE
from luthier.work.hold_servicer import Holdable, HoldServicer
from luthier.work.holds import Holds
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.measured_blobs import BlobMetrics, MeasuredBlobs, MeasuredStaging
from luthier.work.metrics import WorkMetrics
from luthier.work.ownership import own_blobs, require_service
from luthier.work.peers import aio_channel
from luthier.work.purging import Purged, PurgeMetrics, Purging
from luthier.work.queue import Queue, QueueSettings
from luthier.work.queue_figures import QueueFigures
from luthier.work.requests import SqlRequestLog
from luthier.work.retention import EventRetention
from luthier.work.servicer import POLICY as WORKER_POLICY
from luthier.work.servicer import Generations, WorkerServicer
from luthier.work.store_metrics import DatabaseMetrics, show_disk
from luthier.work.tasks import TaskKind
from luthier.work.waiting import WaitingTasks
from luthier.work.workers import Workers
from luthier.worker.v1 import hold_service_pb2_grpc, worker_service_pb2_grpc

_EXPIRY_SECONDS = 1.0
# Three services stand beside a training on one machine: what they do while nothing happens is taken from it.
_QUEUE_SECONDS = 5.0
_HOLDS_SECONDS = 2.0
_ABSENCE_SECONDS = 30.0
_FORGET_SECONDS = 3600.0
_PURGE_SECONDS = 5.0
_LEAST_FLOOR_BYTES = 64 << 20
"""Who gives less of a floor than this has no room to keep for cancelling either."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """How to host a service.

    Attributes:
        name: data, training or evaluation; also the folder of its state below `home`.
        home: where all state lives.
        address: host:port to serve on.
        metrics_address: host:port of /metrics.
        projects: ids of the projects that exist.
        migrations: version folder of the service's own tables.
        kinds: kinds of task that the service queues.
        keeping: how long what is over is kept.
        queue: limits of leases and attempts.
        min_free_bytes: room on the disk that new uploads, resources and attempts leave free.
        blob_grace_seconds: blobs that nothing needs stay so long.
        blob_stray_seconds: those that no row ever named stay so long before that; 0: for ever.
        database_url: where its database is; empty: a file below `home`.
        blobs_url: where its blobs are; empty: a folder below `home`.
    """

    name: str
    home: Path
    address: str
    metrics_address: str
    projects: tuple[str, ...]
    migrations: Path
    kinds: tuple[TaskKind, ...]
    keeping: Keeping
    queue: QueueSettings = field(default_factory=QueueSettings)
    min_free_bytes: int = MIN_FREE_BYTES
    blob_grace_seconds: float = GRACE_SECONDS
    blob_stray_seconds: float = STRAY_SECONDS
    database_url: str = ""
    blobs_url: str = ""

    @property
    def urls(self) -> StoreUrls:
        """Where its state is."""
        return store_urls(self.folder, self.database_url, self.blobs_url)

    @property
    def folder(self) -> Path:
        """Where the service keeps its state."""
        return self.home / self.name


class Parts:
    """What a hosted service is built from."""

    def __init__(self, settings: ServiceSettings, keys: Keys, stores: Stores, stack: AsyncExitStack) -> None:
        self.database = database = stores.database
        self.metrics = MetricsServer(settings.metrics_address)
        registry = self.metrics.registry
        database.observe(DatabaseMetrics(registry))
        show_disk(registry, database.disk)
        blob_metrics = BlobMetrics(registry)
        self.blobs: BlobStore = MeasuredBlobs(stores.blobs, blob_metrics)
        self.staging: Staging = MeasuredStaging(stores.staging, blob_metrics)
        patience = Patience(
            grace_seconds=settings.blob_grace_seconds, stray_seconds=settings.blob_stray_seconds
        )
        self.collector = Collector(database, self.blobs, CollectionMetrics(registry), patience)
        self.log = EventLog(database)
        self.keeping = settings.keeping
        self.task_tokens = TaskTokens(keys.token_secret)
        self.page_tokens = PageTokens(keys.token_secret.encode())
        self.work_metrics = WorkMetrics(registry, settings.kinds)
        self.workers = Workers(self.work_metrics, settings.queue.lease_seconds)
        self.queue = Queue(database, self.log, self.work_metrics, settings.queue)
        self.figures = QueueFigures(database, self.workers, self.work_metrics)
        self._keepers: dict[str, Keeper] = {}
        self.elsewhere = Elsewhere(database, self._keepers)
        self._looked_at = time.time()
        self._stack = stack

    async def expire(self) -> None:
        """Look at leases and workers; what was silent while this process was away gets a full period."""
        if self.queue.begin_round():
            _logger.warning("this process was away, every lease gets a full period")
            self.workers.excuse()
        # The machine may have slept, which no clock of leases tells; holds end by the calendar.
        now, last = time.time(), self._looked_at
        self._looked_at = now
        if now - last > _ABSENCE_SECONDS:
            await self.excuse_holds()
        await self.queue.expire()
        self.workers.show()

    async def excuse_holds(self) -> None:
        """Give the holds of other services some time: while this process was away, nobody could prolong them."""
        async with self.database.transaction(makes_room=True) as connection:
            await Holds().excuse(connection)

    async def forget_expired_holds(self) -> None:
        """Delete holds of other services whose time is over."""
        async with self.database.transaction() as connection:
            await Holds().forget_expired(connection)

    def channel(self, address: str) -> grpc.aio.Channel:
        """Open a channel to another service; closed when this one stops."""
        channel = aio_channel(address)
        self._stack.push_async_callback(channel.close)
        return channel

    def holds_at(self, channel: grpc.aio.Channel, peer: str, *collections: str) -> None:
        """Have resources of these collections, `models` say, held at the service that a channel leads to."""
        keeper = GrpcKeeper(channel, self.task_tokens, peer)
        self._keepers.update(dict.fromkeys(collections, keeper))

    def at_end(self, close: Callable[[], None]) -> None:
        """Have something closed when this process stops."""
        self._stack.callback(close)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chore:
    """Background work that is done again and again, `interval_seconds` after it was done."""

    work: Callable[[], Awaitable[None]]
    interval_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """What a service brings: its servicers, who follows its tasks, what it does before it serves and while it does.

    `families` holds what other services may hold, by the id of its collection; `purged` are those whose deleted
    resources go for good in the end, what holds others before those.
    """

    registrations: Sequence[Registration]
    handlers: dict[TaskKind, TaskHandler]
    policy: Policy
    families: Mapping[str, Holdable] = field(default_factory=dict)
    purged: Sequence[Purged] = ()
    generations: Generations | None = None
    before_serving: Callable[[], Awaitable[None]] | None = None
    chores: Sequence[Chore] = ()


Build = Callable[[Parts], Hosted]
Opening = Callable[[StoreUrls, int], Stores]
"""Opens the stores of a service; the bytes are what stays free on their disk."""


@asynccontextmanager
async def hosting(settings: ServiceSettings, build: Build, opening: Opening) -> AsyncIterator[int]:
    """Serve for the length of a block, on stores that `opening` opens; yields the port."""
    # Before anything is looked at: whoever has the port may be at work on the same state.
    require_free(settings.address)
    async with AsyncExitStack() as stack:
        for changed in secure_home(settings.home):
            _logger.warning(changed)
        keys = read_or_create_keys(settings.home)
        granted = read_granted(settings.home)
        _warn_of_unserved(granted, settings.projects)
        urls = settings.urls
        # First: it refuses what cannot be before anything is migrated.
        stores = opening(urls, settings.min_free_bytes)
        database = stores.database
        stack.push_async_callback(database.close)
        await require_service(stores.blobs, settings.name)
        await _reserve(database)
        await asyncio.to_thread(upgrade, urls.database, (schema.MIGRATIONS, settings.migrations))
        is_beside = urls == store_urls(settings.folder)
        await own_blobs(database, stores.blobs, settings.name, is_beside=is_beside)
        parts = Parts(settings, keys, stores, stack)
        hosted = build(parts)
        for kind, handler in hosted.handlers.items():
            parts.queue.register(kind, handler)
        if hosted.before_serving is not None:
            await hosted.before_serving()
        await parts.queue.recover()
        await parts.excuse_holds()
        request_log = SqlRequestLog(database, settings.keeping.answer_keep_seconds)
        waiting = WaitingTasks(database, parts.log, hosted.handlers, parts.workers)
        waits = Chore(work=waiting.look, interval_seconds=_QUEUE_SECONDS)
        purges = _purging(parts, hosted.purged)
        collecting = _collecting(parts.collector, settings.blob_grace_seconds)
        for chore in (*_chores(parts, request_log), *collecting, waits, purges, *hosted.chores):
            task = asyncio.create_task(_repeat(chore.work, chore.interval_seconds))
            stack.push_async_callback(_ended, task)
        running = await stack.enter_async_context(
            serving(
                ServerOptions(address=settings.address),
                [*hosted.registrations, *_internal(parts, hosted)],
                authenticator=Authenticator(
                    keys, parts.task_tokens, projects=settings.projects, granted=granted
                ),
                policy={**hosted.policy, **WORKER_POLICY, **HOLD_POLICY},
                request_log=request_log,
                metrics=parts.metrics,
            )
        )
        stack.callback(parts.queue.stop)
        yield running.port


def _warn_of_unserved(granted: Sequence[GrantedKey], served: Sequence[str]) -> None:
    for key in granted:
        if unserved := sorted(key.projects - {ALL_PROJECTS, *served}):
            _logger.warning(
                "the key %s is of projects that are not served: %s; LUTHIER_PROJECTS says which are",
                key.name,
                ", ".join(unserved),
            )


def _chores(parts: Parts, request_log: SqlRequestLog) -> list[Chore]:
    """Return what every service does beside its calls."""
    keeping = parts.keeping
    events = EventRetention(parts.database, parts.log, keeping.event_keep_seconds)
    tasks = partial(parts.queue.forget_finished, keeping.task_keep_seconds)
    return [
        Chore(work=parts.expire, interval_seconds=_EXPIRY_SECONDS),
        Chore(work=parts.figures.look, interval_seconds=_QUEUE_SECONDS),
        Chore(work=parts.elsewhere.sweep, interval_seconds=_HOLDS_SECONDS),
        Chore(work=request_log.forget_old, interval_seconds=_FORGET_SECONDS),
        Chore(work=tasks, interval_seconds=_FORGET_SECONDS),
        Chore(work=parts.forget_expired_holds, interval_seconds=_FORGET_SECONDS),
        Chore(work=events.trim, interval_seconds=_FORGET_SECONDS),
    ]


def _purging(parts: Parts, purged: Sequence[Purged]) -> Chore:
    """Return how deleted resources go for good."""
    metrics = PurgeMetrics(parts.metrics.registry)
    purging = Purging(parts.database, parts.log, purged, metrics, parts.keeping.deleted_keep_seconds)
    return Chore(work=purging.sweep, interval_seconds=_PURGE_SECONDS)


def _collecting(collector: Collector, grace_seconds: float) -> list[Chore]:
    """Return how blobs are given back. Who shortens the grace period wants them back sooner."""
    return [
        Chore(work=collector.collect_loose, interval_seconds=min(LOOSE_SECONDS, grace_seconds)),
        Chore(work=collector.look, interval_seconds=min(LOOK_SECONDS, grace_seconds)),
    ]


def _internal(parts: Parts, hosted: Hosted) -> list[Registration]:
    """Return what every service serves beside the public API."""
    worker = WorkerServicer(
        parts.queue,
        parts.workers,
        parts.blobs,
        parts.task_tokens,
        hosted.generations,
    )
    return [
        Registration(
            add=worker_service_pb2_grpc.add_WorkerServiceServicer_to_server,
            servicer=worker,
            name="luthier.worker.v1.WorkerService",
        ),
        Registration(
            add=hold_service_pb2_grpc.add_HoldServiceServicer_to_server,
            servicer=HoldServicer(parts.database, hosted.families),
            name=HOLD_SERVICE.full_name,
        ),
    ]


async def _reserve(database: Database) -> None:
    if database.disk.min_free_bytes < _LEAST_FLOOR_BYTES:
        await database.forgo_reserve()
        return
    try:
        await database.reserve()
    except ResourceExhausted as full:
        _logger.warning("no room is kept for cancelling: %s", full.message)


async def host(settings: ServiceSettings, build: Build, opening: Opening) -> None:
    """Serve on stores that are opened here until SIGTERM or SIGINT. What the process creates is its owner's alone."""
    keep_private()
    with traced(settings.name):
        async with hosting(settings, build, opening):
            _settle()
            await stop_signal()


def _settle() -> None:
    """Search what the process has made so far for garbage once, and never again.

    It lives as long as the process. A full search goes through all of it, 0.1 s, while no call is answered or refused.
    """
    gc.collect()
    gc.freeze()


async def _ended(task: asyncio.Task[None]) -> None:
    """End background work, and have it give back what it has of the database."""
    task.cancel()
    await asyncio.wait([task])


async def _repeat(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await work()
        except Exception:  # the next round may do better; a lease is expired late rather than never
            _logger.exception("background work failed")
        await asyncio.sleep(seconds)
