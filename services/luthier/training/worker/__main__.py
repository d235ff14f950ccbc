"""`python -m luthier.training.worker`: run one training worker until SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from luthier.lm.importing import uncollected
from luthier.work.peers import channel
from luthier.work.rewards import RewardAddresses
from luthier.work.running import Runner
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import read_worker_config, worker_settings


def main() -> None:
    """Work for the Training service."""
    config = read_worker_config()
    with uncollected():
        import torch

        from luthier.lm.device import choose_device

        # A device that is not there is refused before transformers is imported, which takes much longer.
        device = choose_device(config.device)
        from luthier.training.worker.register import run_register
        from luthier.training.worker.registrar import Registrar
        from luthier.training.worker.train import Trainer

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    registrar = Registrar(num_threads=config.num_threads)
    with channel(config.data_address) as data_channel:
        runners: Mapping[TaskKind, Runner] = {
            TaskKind.REGISTER_MODEL: partial(run_register, register=registrar.register),
            TaskKind.TRAIN: Trainer(data_channel, device, RewardAddresses(config.reward_addresses)),
        }
        asyncio.run(run_worker(worker_settings(config, "training", config.training_address), runners))


if __name__ == "__main__":
    main()
