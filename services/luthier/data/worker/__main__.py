"""`python -m luthier.data.worker`: run one data worker until SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from luthier.data.worker.build_task import version_builder
from luthier.data.worker.order import BuildOrder
from luthier.data.worker.render_task import renderer
from luthier.data.worker.version_rendering import RenderOrder
from luthier.runtime.clear_errors import clear_errors
from luthier.work.children import Children, Program
from luthier.work.context import TaskContext
from luthier.work.device import processor
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import read_worker_config, worker_settings


@clear_errors()
def main() -> None:
    """Work for the Data service. This process computes nothing."""
    config = read_worker_config()
    with Children(program_of(config.log_level)) as children:
        children.require_ready()
        compute = in_child(children)
        runners = {
            TaskKind.BUILD_VERSION: version_builder(compute),
            TaskKind.RENDER: renderer(config.training_address, compute),
        }
        settings = worker_settings(config, "data", config.data_address, processor())
        settings = replace(settings, counts=children.counts)
        asyncio.run(run_worker(settings, runners))


def program_of(log_level: str) -> Program:
    """Return what the processes that compute run."""
    return Program(command=("-P", "-m", "luthier.data.worker.child"), setup=log_level)


def in_child(children: Children) -> Callable[[BuildOrder | RenderOrder, TaskContext], Any]:
    """Return what does an order in a process of its own, one of `children`. It raises what `Children.run` does."""
    return lambda order, context: children.run(order, {"progress": context.progress}, context)


if __name__ == "__main__":
    main()
