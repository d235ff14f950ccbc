"""Services that take whatever is created."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from luthier.v1.data_service_pb2 import ListDatasetVersionErrorsResponse
from luthier.v1.dataset_pb2 import (
    Dataset,
    DatasetVersion,
)
from luthier.v1.evaluation_pb2 import (
    Evaluation,
)
from luthier.v1.event_pb2 import Event, StateChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FineTuningPlan
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.upload_pb2 import Upload

PARENT = "projects/default"
VERSION = f"{PARENT}/datasets/mine/versions/v1"


class Creating:
    """Takes whatever is created and keeps the requests, by method."""

    def __init__(self, services: Any) -> None:
        self.requests: dict[str, list[Any]] = {}
        ready = {
            "CreateFineTuningJob": FineTuningJob(name=f"{PARENT}/fineTuningJobs/new"),
            "PlanFineTuningJob": FineTuningPlan(num_steps=1),
            "CreateRendering": Rendering(name=f"{PARENT}/renderings/new"),
            "CreateEvaluation": Evaluation(name=f"{PARENT}/evaluations/new"),
            "CreateDataset": Dataset(name=f"{PARENT}/datasets/mine"),
            "CreateDatasetVersion": DatasetVersion(name=VERSION),
        }
        for method, answer in ready.items():
            services.answers[method] = self._taking(method, answer)
        done = Event(sequence=1, state_change=StateChange(state="READY"))
        services.answers.update(
            WatchRendering=lambda request, context: iter([done]),
            GetRendering=lambda request, context: Rendering(name=request.name, state=Rendering.STATE_READY),
            WatchDatasetVersion=lambda request, context: iter([done]),
            GetDatasetVersion=lambda request, context: DatasetVersion(
                name=VERSION, state=DatasetVersion.STATE_READY
            ),
            ListDatasetVersionErrors=lambda request, context: ListDatasetVersionErrorsResponse(),
            StartUpload=lambda request, context: Upload(
                name=f"{PARENT}/uploads/{request.upload.filename.partition('.')[0]}",
                state=Upload.STATE_RECEIVING,
            ),
            WriteUpload=_written,
        )

    def _taking(self, method: str, answer: Any) -> Callable[[Any, Any], Any]:
        def take(request: Any, context: Any) -> Any:
            self.requests.setdefault(method, []).append(request)
            return answer

        return take

    def one(self, method: str) -> Any:
        (request,) = self.requests[method]
        return request


def _written(requests: Iterator[Any], context: Any) -> Upload:
    chunks = list(requests)
    return Upload(name=chunks[0].name, state=Upload.STATE_COMPLETE)
