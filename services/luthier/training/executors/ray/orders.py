"""What a driver orders of the process that puts ranks into a cluster, and what each rank is given. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from luthier.training.executors.vigil import Bounds
from luthier.training.worker.order import TrainOrder
from luthier.v1 import rendering_pb2
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The ranks that a worker has in a cluster.

    Attributes:
        address: of the cluster, `host:port`; auto: the one that this machine is of.
        num_ranks: how many; a job may take fewer.
        device: of each, as torch calls it: cpu or cuda.
        num_threads: torch's of each rank, and processors that it takes.
        bounds: how long a rank may go without a sign.
        place_seconds: how long the cluster may take to find room for them.
    """

    address: str
    num_ranks: int
    device: str = "cpu"
    num_threads: int = 1
    bounds: Bounds = field(default_factory=Bounds)
    place_seconds: float = 60.0

    @property
    def rank_takes(self) -> dict[str, float]:
        """What each rank takes of a node, by Ray's names."""
        processors = {"CPU": float(self.num_threads)}
        return processors if self.device == "cpu" else {**processors, "GPU": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOrder:
    """One TRAIN task for the ranks of a cluster."""

    order: TrainOrder
    fleet: Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class FarRows:
    """The rows of a rendering, in a file that the post offers by its digest."""

    sha256: str
    size_bytes: int
    rendering: rendering_pb2.Rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What each rank is given.

    Attributes:
        attempt: names the folder of this attempt on each machine.
        task: with its specification.
        rows: of the job's own rendering, then of those that it mixes in.
        place: the folder on the driver's machine where files of ranks go.
        num_ranks: that train together.
        device: of each, cpu or cuda.
        num_threads: torch's.
    """

    attempt: str
    task: task_pb2.Task
    rows: tuple[FarRows, ...]
    place: Path
    num_ranks: int
    device: str
    num_threads: int
