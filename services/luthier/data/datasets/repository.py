"""Datasets and their versions in SQL."""

from __future__ import annotations

from luthier.data import schema
from luthier.storage.stored import Rows
from luthier.stored.v1.data_pb2 import DatasetPrivate, DatasetVersionPrivate
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.work.families import WAITING

DatasetRows = Rows[Dataset, DatasetPrivate]
VersionRows = Rows[DatasetVersion, DatasetVersionPrivate]


def datasets() -> DatasetRows:
    """Return the stored datasets."""
    return Rows(schema.datasets, Dataset, DatasetPrivate)


def versions() -> VersionRows:
    """Return the stored versions."""
    return Rows(schema.dataset_versions, DatasetVersion, DatasetVersionPrivate, progress_fields=(WAITING,))
