"""What the Training service reads from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luthier.storage.disk import MIN_FREE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the service, section TRAINING; what `runtime.config.SHARED` lists has its default there.

    `model_roots`: folders below which base models may be read; empty means the home. `lease_seconds`: a
    worker that is silent this long loses its task.
    """

    home: Path
    log_level: str
    projects: tuple[str, ...]
    data_address: str
    training_address: str
    metrics_address: str = "127.0.0.1:9602"
    model_roots: tuple[str, ...] = ()
    lease_seconds: float = 30.0
    min_free_bytes: int = MIN_FREE_BYTES
    """Room on the disk of the home that new uploads, resources and attempts leave free; 0: none."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders below which base models may be read."""
        return tuple(Path(root).expanduser() for root in self.model_roots) or (self.home,)
