"""Another service that holds its resources, in memory: as a keeper, and on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from luthier.data.datasets.repository import datasets
from luthier.errors import LuthierError, Unavailable
from luthier.runtime.server import Registration
from luthier.storage.database import Database
from luthier.storage.stored import Stored
from luthier.stored.v1.data_pb2 import DatasetPrivate
from luthier.v1.dataset_pb2 import Dataset
from luthier.work.elsewhere import Hold
from luthier.work.hold_servicer import SERVICE
from luthier.worker.v1 import hold_service_pb2, hold_service_pb2_grpc

StoredDataset = Stored[Dataset, DatasetPrivate]


async def dataset(database: Database, name: str) -> StoredDataset:
    async with database.transaction() as connection:
        message = Dataset(name=f"projects/p/datasets/{name}")
        return await datasets().insert(connection, message, DatasetPrivate())


@dataclass(eq=False)
class MemoryKeeper:
    """Knows what is held, for how long; `away` is raised instead by every call."""

    kept: dict[str, tuple[Hold, float]] = field(default_factory=dict)
    away: LuthierError | None = None
    loses_answers: bool = False
    num_calls: int = 0

    async def keep(self, hold: Hold, seconds: float) -> str:
        self._called()
        self.kept[hold.hold] = (hold, seconds)
        if self.loses_answers:
            raise Unavailable("the answer was lost")
        return hold.uid or f"uid of {hold.name}"

    async def release(self, hold: Hold) -> None:
        self._called()
        self.kept.pop(hold.hold, None)

    def holders(self) -> list[tuple[str, str]]:
        """What is held by whom."""
        return sorted((hold.name, hold.holder) for hold, _ in self.kept.values())

    def _called(self) -> None:
        self.num_calls += 1
        if self.away is not None:
            raise self.away


class HoldsOfAnyone(hold_service_pb2_grpc.HoldServiceServicer):
    """Holds whatever it is asked to hold."""

    def __init__(self) -> None:
        self.holders: dict[str, str] = {}

    async def CreateHold(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.holders[request.hold] = request.holder
        return hold_service_pb2.CreateHoldResponse(uid=request.uid)

    async def ReleaseHold(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.holders.pop(request.hold, None)
        return hold_service_pb2.ReleaseHoldResponse()

    def registration(self) -> Registration:
        """How a fake service serves it."""
        add = hold_service_pb2_grpc.add_HoldServiceServicer_to_server
        return Registration(add=add, servicer=self, name=SERVICE.full_name)
