"""Configuration of a worker process, the same for every kind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.runtime.config import read
from luthier.runtime.home import keep_private
from luthier.runtime.keys import read_or_create_keys
from luthier.work.requirements import Equipment

if TYPE_CHECKING:
    from luthier.work.worker import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker reads from the environment."""

    home: Path
    log_level: str
    data_address: str
    training_address: str
    evaluation_address: str
    reward_addresses: tuple[str, ...]
    """Where a worker may ask reward services: `host` is any port of it, `host:port` that port alone."""
    judge_addresses: tuple[str, ...]
    """Where an evaluation worker may ask language models that judge, written likewise."""
    judge_keys: tuple[str, ...]
    """Keys that they may be asked with: `VARIABLE@host:port` or `/path/of/file@host:port`; a key goes nowhere else."""
    cache_bytes: int = 20 << 30
    """Size limit of the cache of files by digest."""
    num_threads: int = 0
    """Threads for torch; 0 means one a core."""
    device: str = "auto"
    """What torch computes on: auto, cpu, cuda, cuda:N, rocm, rocm:N. A data worker has no torch, and computes on the
    processor."""
    executor: str = "inline"
    """How a training worker runs a training: inline, in one process; torchrun, on `ranks` ranks of this machine; ray,
    on `ranks` ranks of a Ray cluster that this machine is a node of."""
    ranks: int = 1
    """Ranks of the executors torchrun and ray, each on a processor or a GPU of its own. Jobs say how many they take."""
    ray_address: str = "auto"
    """The cluster of the executor ray, `host:port` of its head; auto means the one that this machine is a node of."""
    model_roots: tuple[str, ...] = ()
    """Folders of this machine below which a training worker reads base models; empty: those of
    LUTHIER_TRAINING_MODEL_ROOTS, else `models` in the home."""
    name: str = ""
    """Added to the worker's id; needed when several workers of a kind serve one service."""
    drain_seconds: float = 20.0
    """Time that a task gets to stop after SIGTERM."""


def read_worker_config() -> WorkerConfig:
    """Read the environment and set up the process's log. Whatever it creates is its owner's alone."""
    from luthier.runtime.logs import configure

    keep_private()
    config = read(WorkerConfig, section="WORKER")
    configure(config.log_level)
    logging.getLogger("grpc").setLevel(logging.WARNING)
    return config


def worker_settings(
    config: WorkerConfig, kind: str, service_address: str, equipment: Equipment
) -> WorkerSettings:
    """Return how to run a worker of a kind (data, training, evaluation) on this machine, with what it has."""
    from luthier.work.worker import WorkerSettings

    worker_id = f"{kind}-{config.name}" if config.name else kind
    return WorkerSettings(
        service_address=service_address,
        worker_id=worker_id,
        credential=read_or_create_keys(config.home).worker_key,
        work_folder=config.home / "work" / worker_id,
        cache_folder=config.home / "cache",
        cache_bytes=config.cache_bytes,
        drain_seconds=config.drain_seconds,
        equipment=equipment,
    )
