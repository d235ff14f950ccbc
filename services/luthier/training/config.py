"""What the Training service reads from the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from luthier.storage.disk import MIN_FREE_BYTES
from luthier.training.model_roots import ROOTS_SETTING, StateUrls, roots_of
from luthier.work.collecting import GRACE_SECONDS, STRAY_SECONDS, patience_of
from luthier.work.keeping import Keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of the service, section TRAINING; what `runtime.config.SHARED` lists has its default there.

    `model_roots`: folders below which training workers of this machine read base models, unless they have a setting of
    their own; the service itself looks at no path. `lease_seconds`: a worker that is silent this long loses its task.

    Raises:
        InvalidArgument: a root of models holds keys and state of the home or of a store elsewhere, or lies among them;
            a store's URL that nobody knows; a time that is none.
    """

    home: Path
    log_level: str
    projects: tuple[str, ...]
    data_address: str
    training_address: str
    reward_addresses: tuple[str, ...]
    """Where reward services of users may be called: `host` is any port of it, `host:port` that port alone."""
    metrics_address: str = "127.0.0.1:9602"
    model_roots: tuple[str, ...] = ()
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
        state = StateUrls(database_url=self.database_url, blobs_url=self.blobs_url)
        roots_of(self.home, self.model_roots, variable=ROOTS_SETTING, states=[state])
