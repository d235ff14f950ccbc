"""What is asked of a service whose worker is not there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.e2e.conftest import Shared
from tests.e2e.typescript_suites import NEEDS_NODE, run_suite
from tests.stores import service_urls

from luthier.client import RetryPolicy
from luthier.errors import Unavailable
from luthier.storage.opening import open_stores
from luthier.training.__main__ import build, settings_of
from luthier.training.config import Config
from luthier.v1.chat_pb2 import ChatMessage
from luthier.work import host, waiting

pytestmark = pytest.mark.e2e


def test_generation_without_a_worker_is_unavailable(tuning: Shared) -> None:
    """The client asks again for a while: a worker may be about to start."""
    soon = RetryPolicy(deadline_seconds=2.0)
    with tuning.cluster.client(retry=soon) as client, pytest.raises(Unavailable) as caught:
        list(client.generate("tiny", [ChatMessage(role="user", content="hi")], max_new_tokens=4))
    assert caught.value.reason == "NO_WORKER"


@NEEDS_NODE
def test_the_typescript_client_is_told_that_there_is_no_worker(tuning: Shared) -> None:
    run_suite("no-worker", tuning.cluster.environment())


@NEEDS_NODE
async def test_the_typescript_client_reads_why_nobody_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that has no worker, and a short patience: of its own it would be a minute before anybody is told."""
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(host, "_QUEUE_SECONDS", 0.2)
    home = tmp_path / "home"
    nobody = "127.0.0.1:1"
    config = Config(
        home=home,
        log_level="INFO",
        projects=("default",),
        data_address=nobody,
        training_address="127.0.0.1:0",
        reward_addresses=("127.0.0.1",),
        metrics_address="127.0.0.1:0",
        **service_urls(home, "training"),
    )
    async with host.hosting(settings_of(config), lambda parts: build(parts, config), open_stores) as port:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
        environment = clean | {"LUTHIER_HOME": str(home), "LUTHIER_TRAINING_ADDRESS": f"127.0.0.1:{port}"}
        await asyncio.to_thread(run_suite, "waiting", environment)
