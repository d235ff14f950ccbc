"""The other services in memory, with the models that the tests name."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.errors import NotFound
from luthier.v1.base_precision_pb2 import BASE_PRECISION_UNSPECIFIED, BasePrecision
from luthier.v1.dataset_pb2 import (
    SPLIT_TEST,
    SPLIT_TRAIN,
    DatasetSource,
    DatasetStatistics,
    DatasetVersion,
    SplitStatistics,
)
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model, Taught
from luthier.v1.rendering_pb2 import Rendering

PARENT = "projects/default"
BASE, TUNED, MORE, OTHER = (f"{PARENT}/models/{name}" for name in ("base", "tuned", "more", "other"))
VERSION = f"{PARENT}/datasets/d/versions/v"


@dataclass
class MemoryPeers:
    """The other services, as far as evaluations ask them."""

    state: dict[str, str] = field(default_factory=dict)
    taught: dict[str, Taught] = field(default_factory=dict)
    precisions: dict[str, BasePrecision.ValueType] = field(default_factory=dict)
    templates: bool = True
    sources: list[DatasetSource] = field(default_factory=list)

    async def version(self, name: str) -> DatasetVersion:
        splits = [
            SplitStatistics(split=SPLIT_TEST, num_records=3),
            SplitStatistics(split=SPLIT_TRAIN, num_records=9),
        ]
        return DatasetVersion(
            name=name,
            uid=f"uid of {name}",
            state=DatasetVersion.State.Value(f"STATE_{self.state.get(name, 'READY')}"),
            digest="dv",
            sources=self.sources,
            statistics=DatasetStatistics(splits=splits),
        )

    async def job(self, name: str) -> FineTuningJob:
        raise NotFound(f"{name} does not exist")

    async def rendering(self, name: str) -> Rendering:
        raise NotFound(f"{name} does not exist")

    async def model(self, name: str) -> Model:
        known = {BASE: "", TUNED: BASE, MORE: BASE, OTHER: ""}
        if name not in known:
            raise NotFound(f"{name} does not exist")
        return Model(
            name=name,
            uid=f"uid of {name}",
            state=Model.State.Value(f"STATE_{self.state.get(name, 'READY')}"),
            digest=f"digest-{name.rsplit('/', 1)[-1]}",
            base_model=known[name],
            has_chat_template=self.templates,
            taught=self.taught.get(name),
            base_precision=self.precisions.get(name, BASE_PRECISION_UNSPECIFIED),
        )
