"""What the data worker orders of a process that computes, and what that may say meanwhile. Imports no gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.data.worker.building import Built
from luthier.v1.dataset_pb2 import DatasetFormat
from luthier.worker.v1 import task_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """One BUILD_VERSION task.

    Attributes:
        spec: of the task.
        sources: the files of its sources, in their order; they are not changed.
        folder: where to write; the driver deletes it.
    """

    spec: task_pb2.BuildVersionSpec
    sources: tuple[Path, ...]
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltVersion:
    """A version's content, and the format of each source."""

    built: Built
    formats: tuple[DatasetFormat.ValueType, ...]


class Desk(Protocol):
    """Who is told how the work goes on."""

    def check(self) -> None:
        """Go on, if the work is still wanted. Call it between units of work, often: it shows signs of life."""
        ...

    def progress(self, phase: str, completed: int, total: int, unit: str) -> None:
        """Report progress."""
        ...
