"""Where PEFT finds the base model of a downloaded adapter: `base_model_name_or_path` of its `adapter_config.json`.

The service knows the base by its resource's name, which is no place that transformers loads from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from luthier.errors import DataLoss
from luthier.v1.model_pb2 import Model

CONFIG = "adapter_config.json"
_RESOURCE = re.compile(r"projects/[^/]+/models/[^/]+")


def based(config: bytes, base: str, revision: str) -> bytes:
    """Return an adapter's configuration with a base model that `from_pretrained` takes, at a revision of it, if any.

    Raises:
        DataLoss: it is no configuration.
    """
    try:
        read = json.loads(config)
        read |= {"base_model_name_or_path": base, "revision": revision or None}
    except (ValueError, TypeError) as error:
        raise DataLoss(f"{CONFIG} cannot be read: {error}") from error
    return (json.dumps(dict(sorted(read.items())), indent=2) + "\n").encode()


def place_of(base: Model) -> tuple[str, str]:
    """Return what `from_pretrained` takes for a registered base model, and its revision; empty: only we have it."""
    if base.WhichOneof("source") == "hub":
        return base.hub.repo_id, base.hub.revision
    return "", ""


def unplaced(folder: Path) -> str:
    """Return the base of a downloaded adapter where it has its name here, which PEFT does not find; else empty.

    Raises as `based`.
    """
    path = folder / CONFIG
    if not path.is_file():
        return ""
    try:
        base = json.loads(path.read_bytes())["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataLoss(f"{path} cannot be read: {error}") from error
    return base if isinstance(base, str) and _RESOURCE.fullmatch(base) else ""
