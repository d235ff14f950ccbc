"""`python -m luthier.training.worker`: run one training worker until SIGTERM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from luthier.runtime.clear_errors import clear_errors
from luthier.training.executors.inline import InChild
from luthier.training.executors.ranks import require_choice, require_devices
from luthier.training.executors.ray.driver import OnRay, found_fleet
from luthier.training.executors.torchrun import Crew, Torchrun
from luthier.training.worker.making import make_in, run_export, run_merge
from luthier.training.worker.register import register_in, run_register
from luthier.training.worker.sources import allowed_roots
from luthier.training.worker.train import Compute, Trainer
from luthier.work.children import Children, Program
from luthier.work.device import ChosenDevice, Setup, chosen_device
from luthier.work.peers import channel
from luthier.work.rewards import RewardAddresses
from luthier.work.running import Runner
from luthier.work.tasks import TaskKind
from luthier.work.worker import run_worker
from luthier.work.worker_config import WorkerConfig, read_worker_config, worker_settings


@clear_errors()
def main() -> None:
    """Work for the Training service. This process computes nothing, and has no torch."""
    config = read_worker_config()
    roots = allowed_roots(config)
    device, executor = chosen(config)
    with Children(program_of(config, device)) as children, channel(config.data_address) as data_channel:
        children.require_ready()
        runners: Mapping[TaskKind, Runner] = {
            TaskKind.REGISTER_MODEL: partial(run_register, register=register_in(children), roots=roots),
            TaskKind.MERGE: partial(run_merge, make=make_in(children)),
            TaskKind.EXPORT: partial(run_export, make=make_in(children)),
            TaskKind.TRAIN: Trainer(
                data_channel, executor(children), RewardAddresses(config.reward_addresses)
            ),
        }
        equipment = replace(device.equipment, num_ranks=config.ranks)
        settings = worker_settings(config, "training", config.training_address, equipment)
        settings = replace(settings, counts=children.counts)
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


def chosen(config: WorkerConfig) -> tuple[ChosenDevice, Callable[[Children], Compute]]:
    """Return what a worker computes on, and what trains there with its processes.

    Raises:
        LuthierError: what is chosen is impossible; the message says why.
    """
    require_choice(config.executor, config.ranks)
    if config.executor == "ray":
        fleet, device = found_fleet(config)
        return device, partial(OnRay, fleet=fleet)
    device = chosen_device(config.device)
    kind = device.name.partition(":")[0]
    require_devices(kind, device.num_available, config.device, config.ranks, device.name)
    if config.executor == "inline":
        return device, InChild
    return device, partial(Torchrun, crew=Crew(num_ranks=config.ranks, num_threads=config.num_threads))


if __name__ == "__main__":
    main()
