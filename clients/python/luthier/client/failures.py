"""What `wait` raises when a resource ends otherwise than well."""

from typing import Generic, TypeVar

from luthier.errors import Failure, LuthierError
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

R = TypeVar("R", DatasetVersion, Evaluation, FineTuningJob, Model, Rendering)


class ResourceFailed(LuthierError, Generic[R]):
    """A resource reached FAILED or CANCELLED. `reason` and `metadata` are those of its failure.

    `resource` is the message as last read, `state` its state without prefix, `failure` the stored cause.
    """

    def __init__(self, resource: R, *, state: str, failure: Failure) -> None:
        message = f"{resource.name} is {state}: {failure.message}"
        super().__init__(message, reason=failure.reason, metadata=failure.metadata)
        self.resource: R = resource
        self.state = state
        self.failure = failure

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.resource, self.state, self.failure)


def _rebuild(kind: type[ResourceFailed[R]], resource: R, state: str, failure: Failure) -> ResourceFailed[R]:
    return kind(resource, state=state, failure=failure)


class VersionFailed(ResourceFailed[DatasetVersion]):
    """A dataset version could not be built, or was cancelled."""


class RenderingFailed(ResourceFailed[Rendering]):
    """A rendering could not be made, or was cancelled."""


class ModelFailed(ResourceFailed[Model]):
    """A base model could not be registered."""


class JobFailed(ResourceFailed[FineTuningJob]):
    """A fine-tuning job failed or was cancelled."""


class EvaluationFailed(ResourceFailed[Evaluation]):
    """An evaluation failed or was cancelled."""
