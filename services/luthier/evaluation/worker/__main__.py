"""Run the evaluation worker: `python -m luthier.evaluation.worker`."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import closing
from dataclasses import replace

from luthier.lm.importing import uncollected
from luthier.runtime.config import put
from luthier.work.cache import BlobCache
from luthier.work.link import WorkerLink
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import device_of, read_worker_config, worker_settings


def main() -> None:
    """Work until SIGTERM."""
    config = read_worker_config()
    # A device that is not there is refused before transformers is imported, which takes much longer.
    device = device_of(config)
    put(device.environment)
    with uncollected():
        import torch

        from luthier.evaluation.worker.answers import ModelAnswers, serve_generations
        from luthier.evaluation.worker.evaluate import Evaluator
        from luthier.evaluation.worker.models import Models

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    settings = worker_settings(config, "evaluation", config.evaluation_address, device.equipment)
    cache = BlobCache(settings.cache_folder, settings.cache_bytes)
    # A name of its own: whether another process works in this folder shows only when the worker's lock is taken.
    folder = settings.work_folder / f"models-{uuid.uuid4().hex}"
    models = Models(config.training_address, cache, folder, torch.device(device.name))
    answers = ModelAnswers(models)

    async def companion(link: WorkerLink, cache: BlobCache) -> None:
        await serve_generations(link, cache, answers)

    settings = replace(settings, companions=(companion,))
    evaluator = Evaluator(config.data_address, models)
    with closing(models), closing(evaluator):
        asyncio.run(run_worker(settings, {TaskKind.EVALUATE: evaluator}))


if __name__ == "__main__":
    main()
