"""What `luthierd` itself reads from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Addresses and folders that all processes share; the children read the rest themselves."""

    home: Path
    data_address: str
    training_address: str
    evaluation_address: str
