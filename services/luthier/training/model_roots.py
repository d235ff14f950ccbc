"""The folders below which base models may be read: never among the keys and the state of a home."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.errors import InvalidArgument

MODELS_FOLDER = "models"
"""The one folder of a home that base models may be read from; beside it lie keys, databases and blobs."""
ROOTS_SETTING = "LUTHIER_TRAINING_MODEL_ROOTS"


def roots_of(home: Path, named: Sequence[str], *, variable: str) -> tuple[Path, ...]:
    """Return the folders that a setting names, `models` in the home where it names none.

    Raises InvalidArgument that names the setting for a folder that holds the home or lies among its state.
    """
    roots = tuple(Path(root).expanduser() for root in named) or (home / MODELS_FOLDER,)
    real_home = home.resolve()
    for root in roots:
        real = root.resolve()
        among_state = real.is_relative_to(real_home) and not real.is_relative_to(real_home / MODELS_FOLDER)
        if among_state or real_home.is_relative_to(real):
            raise InvalidArgument(
                f"{variable} must name folders that hold models and nothing of the home's keys and state, got {root}; "
                f"put models into {home / MODELS_FOLDER} or outside of the home"
            )
    return roots
