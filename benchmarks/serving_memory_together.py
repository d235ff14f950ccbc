"""An evaluation worker that computes in its own process, as all did before each base model had one (DECISIONS 86).

For `serving_memory.py`, which starts it in place of `luthierd worker evaluation`: the same services, tasks, files and
limited processes, and torch beside gRPC.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from queue import SimpleQueue

from luthier.errors import Reason, Unavailable
from luthier.evaluation.access import Access
from luthier.evaluation.worker.answers import ModelAnswers, serve_generations
from luthier.evaluation.worker.computing import Computing, loaded
from luthier.evaluation.worker.evaluate import Evaluator
from luthier.evaluation.worker.models import Models
from luthier.evaluation.worker.order import Facts, LoadOrder
from luthier.work.cache import BlobCache
from luthier.work.device import chosen_device
from luthier.work.judge_access import JudgeAccess
from luthier.work.limited import Check
from luthier.work.link import WorkerLink
from luthier.work.rewards import RewardAddresses
from luthier.work.standing import Log, Requests
from luthier.work.standing_child import Request, Stop
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import read_worker_config, worker_settings


class Together:
    """A base model in this process: a `Place`, and what hears the answers."""

    def __init__(self, order: LoadOrder) -> None:
        self._order = order
        self._inbox: SimpleQueue[Request | Stop | None] = SimpleQueue()
        self.requests = Requests(self._inbox.put)
        self.say = self.requests.say
        self.step = self.requests.step

    def begun(self, check: Check = lambda: None) -> Facts:
        """Load it, here and now."""
        check()
        model, facts, head = loaded(self._order, "cpu")
        self._computing = Computing(model, self, self._ended, head)
        threading.Thread(target=self._answer, name="together", daemon=True).start()
        return facts

    def reporting(self, log: Log) -> AbstractContextManager[None]:
        """Nobody watches it."""
        del log
        return nullcontext()

    def close(self) -> None:
        """End it when its step is done."""
        self._computing.thread.stop()
        self._inbox.put(None)

    def idle(self) -> None:
        """Nobody watches it."""

    def _ended(self) -> None:
        self.requests.end(Unavailable("the model is being taken out of memory", reason=Reason.SHUTTING_DOWN))

    def _answer(self) -> None:
        while (message := self._inbox.get()) is not None:
            if isinstance(message, Request):
                self._computing.ask(message)
            else:
                self._computing.stop(message.number)


def main() -> None:
    """Work until SIGTERM."""
    config = read_worker_config()
    access = Access(judges=JudgeAccess.of_worker(config), rewards=RewardAddresses(config.reward_addresses))
    device = chosen_device(config.device)
    settings = worker_settings(config, "evaluation", config.evaluation_address, device.equipment)
    cache = BlobCache(settings.cache_folder, settings.cache_bytes)
    folder = settings.work_folder / f"models-{uuid.uuid4().hex}"
    models = Models(config.training_address, cache, folder, Together)
    answers = ModelAnswers(models)

    async def companion(link: WorkerLink, cache: BlobCache) -> None:
        await serve_generations(link, cache, answers)

    evaluator = Evaluator(config.data_address, models, access)
    with closing(models), closing(evaluator):
        runners: dict[TaskKind, Evaluator] = {TaskKind.EVALUATE: evaluator, TaskKind.ANSWER_SHARE: evaluator}
        asyncio.run(run_worker(replace(settings, companions=(companion,)), runners))


if __name__ == "__main__":
    main()
