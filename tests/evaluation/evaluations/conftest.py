"""An Evaluation service on a real database and queue, beside peers in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.evaluation.evaluations.memory_peers import BASE, PARENT, TUNED, VERSION, MemoryPeers
from tests.stores import database_url, open_database
from tests.work.keepers import MemoryKeeper

from luthier.evaluation.access import Access
from luthier.evaluation.evaluations.dealing import ShareHandler
from luthier.evaluation.evaluations.service import EvaluationService, Outside
from luthier.evaluation.evaluations.servicer import EvaluateHandler
from luthier.evaluation.schema import MIGRATIONS
from luthier.storage.database import Database
from luthier.storage.memory_blobs import MemoryBlobStore
from luthier.storage.migrations import upgrade
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm, Prediction
from luthier.v1.evaluation_service_pb2 import CreateEvaluationRequest
from luthier.v1.event_pb2 import StateChange
from luthier.work import schema
from luthier.work.elsewhere import Elsewhere
from luthier.work.judge_access import JudgeAccess
from luthier.work.keeping import Keeping
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.queue import Queue, QueueSettings
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import Task, TaskKind
from luthier.work.webhooks.targets import Targets
from luthier.worker.v1 import task_pb2


def draft(**changes: object) -> Evaluation:
    arms = [EvaluationArm(arm_id="zero", model=BASE), EvaluationArm(arm_id="tuned", model=TUNED)]
    return Evaluation(**{"dataset_version": VERSION, "arms": arms, **changes})  # type: ignore[arg-type]


@dataclass
class Bench:
    """A service, its queue and its blobs."""

    service: EvaluationService
    queue: Queue
    blobs: MemoryBlobStore
    log: EventLog
    database: Database
    peers: MemoryPeers
    keeper: MemoryKeeper
    elsewhere: Elsewhere

    async def create(self, **changes: object) -> Evaluation:
        request = CreateEvaluationRequest(parent=PARENT, evaluation=draft(**changes), evaluation_id="e")
        return await self.service.create(request)

    async def get(self, name: str) -> Evaluation:
        return (await self.service.family.read(name)).message

    async def cancel(self, name: str, etag: str = "") -> Evaluation:
        return await self.service.family.cancel(name, etag)

    async def predictions(self, name: str, first_row: int, limit: int, limit_bytes: int) -> list[Prediction]:
        evaluation = await self.service.family.read(name)
        return await self.service.predictions.read(evaluation, first_row, limit, limit_bytes)

    async def claim(
        self, kind: TaskKind = TaskKind.EVALUATE, worker: str = "w@1"
    ) -> tuple[Task, task_pb2.Task]:
        claimed = await self.queue.claim(worker, [kind], 0.0)
        assert claimed is not None
        return claimed

    async def changes(self, name: str = "e") -> list[StateChange]:
        async with self.database.reading() as connection:
            stored = await self.service.family.get(connection, f"{PARENT}/evaluations/{name}")
            events = await self.log.read(connection, stored.uid, 1, 100)
        return [event.state_change for event in events if event.HasField("state_change")]

    async def states(self, name: str = "e") -> list[str]:
        return [change.state for change in await self.changes(name)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    upgrade(database_url(tmp_path / "evaluation"), (schema.MIGRATIONS, MIGRATIONS))
    database = open_database(tmp_path / "evaluation")
    log, peers, blobs = EventLog(database), MemoryPeers(), MemoryBlobStore()
    kinds = (TaskKind.EVALUATE, TaskKind.ANSWER_SHARE)
    queue = Queue(database, log, WorkMetrics(CollectorRegistry(), kinds), QueueSettings())
    keeper = MemoryKeeper()
    elsewhere = Elsewhere(database, {"versions": keeper, "models": keeper})
    outside = Outside(
        peers=peers,
        elsewhere=elsewhere,
        webhooks=Targets(["127.0.0.1"]),
        access=Access(
            judges=JudgeAccess(("127.0.0.1",), ("JUDGE_KEY@127.0.0.1",)),
            rewards=RewardAddresses(["127.0.0.1"]),
        ),
    )
    service = EvaluationService(database, log, queue, blobs, outside, Keeping())
    queue.register(TaskKind.EVALUATE, EvaluateHandler(service))
    queue.register(TaskKind.ANSWER_SHARE, ShareHandler(service, blobs))
    yield Bench(service, queue, blobs, log, database, peers, keeper, elsewhere)
    await database.close()
