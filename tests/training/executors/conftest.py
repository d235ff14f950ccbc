"""The same services as for workers."""

from tests.training.worker.conftest import model_folder, site

__all__ = ["model_folder", "site"]
