"""DataService, put together from its families."""

from __future__ import annotations

from luthier.data.datasets.servicer import DatasetsServicer
from luthier.data.renderings.servicer import RenderingsServicer
from luthier.data.uploads.servicer import UploadsServicer
from luthier.runtime.policies import policy_of
from luthier.runtime.server import Registration, of_families
from luthier.v1 import data_service_pb2, data_service_pb2_grpc

SERVICE = data_service_pb2.DESCRIPTOR.services_by_name["DataService"]
POLICY = policy_of(
    SERVICE,
    reads=(
        "GetDataset",
        "ListDatasets",
        "GetUpload",
        "ListUploads",
        "GetDatasetVersion",
        "ListDatasetVersions",
        "WatchDatasetVersion",
        "ListDatasetVersionErrors",
        "ListRecords",
        "ReadRecords",
        "GetRendering",
        "ListRenderings",
        "WatchRendering",
        "ListRenderingErrors",
        "PreviewRendering",
        "ReadRendering",
    ),
    changes=(
        "CreateDataset",
        "DeleteDataset",
        "UndeleteDataset",
        "PurgeDataset",
        "StartUpload",
        "WriteUpload",
        "CancelUpload",
        "DeleteUpload",
        "UndeleteUpload",
        "PurgeUpload",
        "CreateDatasetVersion",
        "CancelDatasetVersion",
        "DeleteDatasetVersion",
        "UndeleteDatasetVersion",
        "PurgeDatasetVersion",
        "CreateRendering",
        "CancelRendering",
        "DeleteRendering",
        "UndeleteRendering",
        "PurgeRendering",
    ),
    tasks=("GetDatasetVersion", "ReadRecords", "GetRendering", "ReadRendering"),
)


def registration(
    datasets: DatasetsServicer, uploads: UploadsServicer, renderings: RenderingsServicer
) -> Registration:
    """Return how to add the service to a server."""
    add = data_service_pb2_grpc.add_DataServiceServicer_to_server
    return of_families(SERVICE, add, (datasets, uploads, renderings))
