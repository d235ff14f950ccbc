"""What the Data service and its worker read from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the service, section DATA; what `luthier.runtime.config.SHARED` lists has its default there.

    `max_upload_bytes`: greatest file that can be uploaded.
    """

    home: Path
    log_level: str
    projects: tuple[str, ...]
    data_address: str
    training_address: str
    metrics_address: str = "127.0.0.1:9601"
    max_upload_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Settings of a data worker, section WORKER.

    `id`: stable name, empty for one made of the host's; two live workers must not share one. `cache_bytes`: limit
    of its cache of files.
    """

    home: Path
    log_level: str
    data_address: str
    training_address: str
    id: str = ""
    cache_bytes: int = 20 << 30
