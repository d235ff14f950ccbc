"""The folders below which base models may be read: never among the keys and the state of a home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import InvalidArgument
from luthier.storage.local_urls import BLOBS, DATABASES

MODELS_FOLDER = "models"
"""The one folder of a home that base models may be read from; beside it lie keys, databases and blobs."""
ROOTS_SETTING = "LUTHIER_TRAINING_MODEL_ROOTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateUrls:
    """Where a service keeps its state, as its settings say it; empty: in the home."""

    database_url: str = ""
    blobs_url: str = ""

    def paths(self) -> tuple[Path, ...]:
        """Return where that is outside of the home. Raises InvalidArgument."""
        named = ((DATABASES, self.database_url), (BLOBS, self.blobs_url))
        return tuple(urls.path_of(url) for urls, url in named if url)


def roots_of(
    home: Path, named: Sequence[str], *, variable: str, states: Sequence[StateUrls] = ()
) -> tuple[Path, ...]:
    """Return the folders that a setting names, `models` in the home where it names none.

    Raises InvalidArgument that names the setting for a folder that holds the home, or a database or blobs elsewhere, or
    lies among them.
    """
    roots = tuple(Path(root).expanduser() for root in named) or (home / MODELS_FOLDER,)
    real_home = home.resolve()
    elsewhere = [path.resolve() for state in states for path in state.paths()]
    for root in roots:
        real = root.resolve()
        among_state = real.is_relative_to(real_home) and not real.is_relative_to(real_home / MODELS_FOLDER)
        if among_state or real_home.is_relative_to(real):
            raise InvalidArgument(
                f"{variable} must name folders that hold models and nothing of the home's keys and state, got {root}; "
                f"put models into {home / MODELS_FOLDER} or outside of the home"
            )
        for path in elsewhere:
            if real.is_relative_to(path) or path.is_relative_to(real):
                raise InvalidArgument(
                    f"{variable} must name folders that hold models and nothing of a service's state, got {root}: "
                    f"{path} is there by LUTHIER_<SERVICE>_DATABASE_URL or _BLOBS_URL; put models somewhere else"
                )
    return roots
