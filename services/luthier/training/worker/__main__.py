"""`python -m luthier.training.worker`: run one training worker until SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from luthier.errors import LuthierError
from luthier.training.worker.order import Setup
from luthier.training.worker.register import register_in, run_register
from luthier.training.worker.train import InChild, Trainer
from luthier.work.children import Children, Program
from luthier.work.device import ChosenDevice
from luthier.work.peers import channel
from luthier.work.rewards import RewardAddresses
from luthier.work.running import Runner
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import WorkerConfig, device_of, read_worker_config, worker_settings


def main() -> None:
    """Work for the Training service. This process computes nothing, and has no torch."""
    config = read_worker_config()
    device = device_of(config)
    with Children(program_of(config, device)) as children, channel(config.data_address) as data_channel:
        try:
            children.require_ready()
        except LuthierError as error:
            raise SystemExit(f"error: {error.message}") from error
        runners: Mapping[TaskKind, Runner] = {
            TaskKind.REGISTER_MODEL: partial(run_register, register=register_in(children)),
            TaskKind.TRAIN: Trainer(
                data_channel, InChild(children), RewardAddresses(config.reward_addresses)
            ),
        }
        settings = worker_settings(config, "training", config.training_address, device.equipment)
        asyncio.run(run_worker(settings, runners))


def program_of(config: WorkerConfig, device: ChosenDevice) -> Program:
    """Return what the processes that compute run."""
    setup = Setup(device=device.name, num_threads=config.num_threads, log_level=config.log_level)
    # Libraries that torch brings read it when they are loaded.
    threads = {"OMP_NUM_THREADS": str(config.num_threads)} if config.num_threads else {}
    return Program(
        command=("-P", "-m", "luthier.training.worker.child"),
        setup=setup,
        environment={**threads, **device.environment},
    )


if __name__ == "__main__":
    main()
