"""Run the evaluation worker: `python -m luthier.evaluation.worker`."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import closing
from dataclasses import replace

from luthier.evaluation.access import Access
from luthier.evaluation.worker.answers import ModelAnswers, serve_generations
from luthier.evaluation.worker.engine import PATIENCE, in_children
from luthier.evaluation.worker.evaluate import Evaluator
from luthier.evaluation.worker.models import Models
from luthier.runtime.clear_errors import clear_errors
from luthier.work.cache import BlobCache
from luthier.work.children import Children, Program
from luthier.work.device import ChosenDevice, Setup, chosen_device
from luthier.work.judge_access import JudgeAccess
from luthier.work.link import WorkerLink
from luthier.work.rewards import RewardAddresses
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import WorkerConfig, read_worker_config, worker_settings

_RELIEVE_SECONDS = 5.0


@clear_errors()
def main() -> None:
    """Work until SIGTERM. This process computes nothing, and has no torch."""
    config = read_worker_config()
    # Before a process is started that could see what is taken.
    access = Access(judges=JudgeAccess.of_worker(config), rewards=RewardAddresses(config.reward_addresses))
    device = chosen_device(config.device)
    children = Children(program_of(config, device), PATIENCE)
    children.require_ready()
    settings = worker_settings(config, "evaluation", config.evaluation_address, device.equipment)
    cache = BlobCache(settings.cache_folder, settings.cache_bytes)
    # A name of its own: whether another process works in this folder shows only when the worker's lock is taken.
    folder = settings.work_folder / f"models-{uuid.uuid4().hex}"
    models = Models(config.training_address, cache, folder, in_children(children))
    answers = ModelAnswers(models)

    async def companion(link: WorkerLink, cache: BlobCache) -> None:
        await serve_generations(link, cache, answers)

    async def relieve(link: WorkerLink, cache: BlobCache) -> None:
        del link, cache
        while True:
            await asyncio.sleep(_RELIEVE_SECONDS)
            await asyncio.to_thread(models.relieve)

    settings = replace(settings, companions=(companion, relieve), counts=children.counts)
    evaluator = Evaluator(config.data_address, models, access)
    # No other process begins when those that hold models are ended.
    with closing(models), closing(evaluator), children:
        runners = {TaskKind.EVALUATE: evaluator, TaskKind.ANSWER_SHARE: evaluator}
        asyncio.run(run_worker(settings, runners))


def program_of(config: WorkerConfig, device: ChosenDevice) -> Program:
    """Return what the processes that hold models run."""
    setup = Setup(device=device.name, num_threads=config.num_threads, log_level=config.log_level)
    # Libraries that torch brings read it when they are loaded.
    threads = {"OMP_NUM_THREADS": str(config.num_threads)} if config.num_threads else {}
    return Program(
        command=("-P", "-m", "luthier.evaluation.worker.child"),
        setup=setup,
        environment={**threads, **device.environment},
    )


if __name__ == "__main__":
    main()
