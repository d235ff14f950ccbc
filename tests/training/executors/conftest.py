"""The same services as for workers."""

from tests.training.worker.conftest import children, model_folder, site

__all__ = ["children", "model_folder", "site"]
