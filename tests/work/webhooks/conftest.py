"""An outbox on a real database, and what sends it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.stores import database_url, open_database

from luthier.runtime.keys import read_or_create_key
from luthier.storage.database import Database
from luthier.storage.migrations import upgrade
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work import schema
from luthier.work.webhooks import outbox
from luthier.work.webhooks.config import WebhookConfig
from luthier.work.webhooks.sender import Sender
from luthier.work.webhooks.signing import SECRET_FILE, SECRET_KIND
from luthier.work.webhooks.targets import Targets

State = WebhookDelivery.State
SECRET_PATH = "/ok?key=s3cret"
A_RECEIVER = outbox.Receiver("a.example", "https://a.example:443")
QUICK = WebhookConfig(
    addresses=("127.0.0.1",), timeout_seconds=1.0, first_delay_seconds=0.1, max_age_seconds=60.0
)


class Bench:
    """An outbox, and senders of it that come and go."""

    def __init__(self, database: Database, home: Path) -> None:
        self.database = database
        self.home = home
        self.secret_file = home / SECRET_FILE
        self.registry = CollectorRegistry()
        read_or_create_key(self.secret_file, SECRET_KIND)

    async def end(self, *urls: str, uid: str = "u1", job: FineTuningJob | None = None) -> None:
        """Have a job of this uid end, in a transaction of its own."""
        message = job or FineTuningJob(name=f"projects/p/fineTuningJobs/{uid}", uid=uid)
        async with self.database.transaction() as connection:
            webhooks = [Webhook(url=url) for url in urls]
            await outbox.record(connection, uid, message, webhooks, "SUCCEEDED")

    async def deliveries(self, uid: str = "u1") -> Sequence[WebhookDelivery]:
        async with self.database.reading() as connection:
            return [one for _, one in await outbox.of_resource(connection, uid, 0, 100)]

    @asynccontextmanager
    async def sending(self, config: WebhookConfig = QUICK) -> AsyncIterator[Sender]:
        """Send for the length of a block, as a service does, looking often."""
        self.registry = CollectorRegistry()
        sender = Sender(
            self.database, Targets(config.addresses, config.networks), self.secret_file, config, self.registry
        )

        async def sweeping() -> None:
            while True:
                await sender.sweep()
                await asyncio.sleep(0.02)

        task = asyncio.create_task(sweeping())
        try:
            yield sender
        finally:
            task.cancel()
            sender.close()

    async def until(
        self, *states: State.ValueType, uid: str = "u1", attempts: int = 0
    ) -> Sequence[WebhookDelivery]:
        """Wait until the deliveries of a job stand so, each after at least so many attempts."""
        deadline = time.monotonic() + 30
        while True:
            found = await self.deliveries(uid)
            if [one.state for one in found] == list(states) and all(
                one.num_attempts >= attempts for one in found
            ):
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def tell(bench: Bench, url: str, project: str, uid: str) -> None:
    """Have a job of a project end."""
    await bench.end(url, uid=uid, job=FineTuningJob(name=f"projects/{project}/fineTuningJobs/{uid}", uid=uid))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    url = database_url(tmp_path / "work")
    await asyncio.to_thread(upgrade, url, (schema.MIGRATIONS,))
    database = open_database(tmp_path / "work")
    yield Bench(database, tmp_path)
    await database.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
