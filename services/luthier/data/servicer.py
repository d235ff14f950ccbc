"""DataService, put together from its families."""

from __future__ import annotations

from luthier.data.datasets.servicer import DatasetsServicer
from luthier.data.renderings.servicer import RenderingsServicer
from luthier.data.uploads.servicer import UploadsServicer
from luthier.runtime.auth import Kind
from luthier.runtime.server import Registration
from luthier.v1 import data_service_pb2, data_service_pb2_grpc

SERVICE = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
_FOR_TASKS = frozenset({"GetDatasetVersion", "ReadRecords", "GetRendering", "ReadRendering"})
_KEY: frozenset[Kind] = frozenset({"key"})
_KEY_OR_TASK: frozenset[Kind] = frozenset({"key", "task"})
POLICY = {
    f"/{SERVICE.full_name}/{method.name}": _KEY_OR_TASK if method.name in _FOR_TASKS else _KEY
    for method in SERVICE.methods
}


class DataServicer:
    """Every method of DataService, each from the one family that has it."""

    def __init__(
        self, datasets: DatasetsServicer, uploads: UploadsServicer, renderings: RenderingsServicer
    ) -> None:
        families = (datasets, uploads, renderings)
        for method in SERVICE.methods:
            found = [family for family in families if hasattr(family, method.name)]
            assert len(found) == 1, f"{method.name} must be of one family, it is of {len(found)}"
            setattr(self, method.name, getattr(found[0], method.name))


def registration(servicer: DataServicer) -> Registration:
    """Return how to add the service to a server."""
    return Registration(
        add=data_service_pb2_grpc.add_DataServiceServicer_to_server,
        servicer=servicer,
        name=SERVICE.full_name,
    )
