"""`python -m luthier.data.worker`: run one data worker until SIGTERM."""

from __future__ import annotations

import asyncio

from luthier.data.worker.build_task import build_version
from luthier.data.worker.render_task import renderer
from luthier.work.limited_child import Limits
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import read_worker_config, worker_settings


def main() -> None:
    """Work for the Data service."""
    config = read_worker_config()
    runners = {
        TaskKind.BUILD_VERSION: build_version,
        TaskKind.RENDER: renderer(config.training_address, Limits()),
    }
    asyncio.run(run_worker(worker_settings(config, "data", config.data_address), runners))


if __name__ == "__main__":
    main()
