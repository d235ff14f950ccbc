"""DataService, put together from its families."""

from __future__ import annotations

from luthier.data.datasets.servicer import DatasetsServicer
from luthier.data.renderings.servicer import RenderingsServicer
from luthier.data.uploads.servicer import UploadsServicer
from luthier.runtime.auth import Kind
from luthier.runtime.server import Registration, of_families
from luthier.v1 import data_service_pb2, data_service_pb2_grpc

SERVICE = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
_FOR_TASKS = frozenset({"GetDatasetVersion", "ReadRecords", "GetRendering", "ReadRendering"})
_KEY: frozenset[Kind] = frozenset({"key"})
_KEY_OR_TASK: frozenset[Kind] = frozenset({"key", "task"})
POLICY = {
    f"/{SERVICE.full_name}/{method.name}": _KEY_OR_TASK if method.name in _FOR_TASKS else _KEY
    for method in SERVICE.methods
}


def registration(
    datasets: DatasetsServicer, uploads: UploadsServicer, renderings: RenderingsServicer
) -> Registration:
    """Return how to add the service to a server."""
    add = data_service_pb2_grpc.add_DataServiceServicer_to_server
    return of_families(SERVICE, add, (datasets, uploads, renderings))
