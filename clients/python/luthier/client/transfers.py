"""How far an upload or a download has come."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferProgress:
    """How far a transfer is.

    `name` is the upload or the path of the model's file; what is sent may not be stored yet.
    """

    name: str
    completed_bytes: int
    total_bytes: int


ProgressCallback = Callable[[TransferProgress], None]
