"""`python -m luthier.data.worker`: run one data worker until SIGTERM."""

from __future__ import annotations

import asyncio
import re
import socket

from luthier.data.config import WorkerConfig
from luthier.data.worker.build_task import build_version
from luthier.data.worker.render_child import Limits
from luthier.data.worker.render_task import renderer
from luthier.runtime.config import read
from luthier.runtime.keys import WORKER_KEY_FILE, read_key
from luthier.runtime.logs import configure
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerPlan, run_worker


def main() -> None:
    """Work for the Data service."""
    config = read(WorkerConfig, section="WORKER")
    configure(config.log_level)
    worker_id = config.id or _default_id()
    home = config.home / "workers" / worker_id
    plan = WorkerPlan(
        service_address=config.data_address,
        worker_id=worker_id,
        credential=read_key(config.home / WORKER_KEY_FILE),
        work_folder=home / "scratch",
        cache_folder=home / "cache",
        cache_bytes=config.cache_bytes,
    )
    runners = {
        TaskKind.BUILD_VERSION: build_version,
        TaskKind.RENDER: renderer(config.training_address, Limits()),
    }
    asyncio.run(run_worker(plan, runners))


def _default_id() -> str:
    host = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().lower())
    return f"data-{host}"[:63].rstrip("-")


if __name__ == "__main__":
    main()
