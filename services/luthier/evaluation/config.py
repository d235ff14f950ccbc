"""What the Evaluation service reads from the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from luthier.storage.disk import MIN_FREE_BYTES
from luthier.work.collecting import GRACE_SECONDS, STRAY_SECONDS, patience_of
from luthier.work.keeping import Keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the service, section EVALUATION."""

    home: Path
    log_level: str
    projects: tuple[str, ...]
    data_address: str
    training_address: str
    evaluation_address: str
    reward_addresses: tuple[str, ...]
    """Where reward services of users may be called: `host` is any port of it, `host:port` that port alone."""
    judge_addresses: tuple[str, ...]
    """Where language models that judge may be asked, written likewise."""
    judge_keys: tuple[str, ...]
    """Keys that they may be asked with: `VARIABLE@host:port` or `/path/of/file@host:port`. The service reads none."""
    metrics_address: str = "127.0.0.1:9603"
    lease_seconds: float = 30.0
    min_free_bytes: int = MIN_FREE_BYTES
    """Room on the disk of the home that new uploads, resources and attempts leave free; 0: none."""
    database_url: str = ""
    """Where the service's database is, `sqlite+aiosqlite:////path/of/a/file`; empty: in the home."""
    blobs_url: str = ""
    """Where its blobs are, `file:///path/of/a/folder`; empty: in the home."""
    blob_grace_seconds: float = GRACE_SECONDS
    """Bytes that nothing needs are deleted after so long; longer than any call and any worker's commit may take."""
    blob_stray_seconds: float = STRAY_SECONDS
    """Bytes that the database never named are found, stay so long, and then for the time above; 0: for ever."""
    keeping: Keeping = field(default_factory=Keeping)
    """How long what is over is kept."""

    def __post_init__(self) -> None:
        patience_of(self.blob_grace_seconds, self.blob_stray_seconds)
