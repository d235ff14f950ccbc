"""The file by which other programs end a tuned model's answers where they are ended here."""

from __future__ import annotations

import json
from typing import Any

from luthier.errors import InvalidArgument, Reason
from luthier.lm.made import GENERATION_CONFIG
from luthier.v1.model_pb2 import Model, Taught

CONFIG = "config.json"
_KEY = "eos_token_id"


def generation_config(base: Model, taught: Taught, settings: bytes, config: bytes = b"") -> bytes:
    """Return the generation config of a model that was tuned on a base: every token that ends its answers is in it.

    These are the base's, and those that it was taught to end answers with. `settings` is the base's own file; empty:
    there is none. It stays as it is, byte for byte, where it names them all; where nobody names any there is none.
    `config` is the base's `config.json`, which is asked where the base does not say its ends: it was registered before
    bases did, and its ends in this file alone would be hidden by those in the other.

    Raises:
        InvalidArgument: MODEL_INVALID; a file of the base is no JSON object, or its `eos_token_id` no id and no list.
    """
    read, named = _settled(base, GENERATION_CONFIG, settings)
    own = base.eos_token_ids or _settled(base, CONFIG, config)[1]
    ends = list(dict.fromkeys((*named, *own, *taught.stop_token_ids)))
    if ends == named:
        return settings
    return json.dumps(read | {_KEY: ends}, indent=2, sort_keys=True).encode() + b"\n"


def _settled(base: Model, path: str, settings: bytes) -> tuple[dict[str, Any], list[int]]:
    """Return what a file of the base says, and the ends that it names; empty: there is none."""
    try:
        read = json.loads(settings or b"{}")
    except ValueError as error:
        raise _invalid(base, path, f"must be JSON: {error}") from error
    if not isinstance(read, dict):
        raise _invalid(base, path, f"must be an object, got {type(read).__name__}")
    value = read.get(_KEY)
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise _invalid(base, path, f"must have token ids in {_KEY}, got {wrong[0]!r}")
    return read, ids


def _invalid(base: Model, path: str, description: str) -> InvalidArgument:
    return InvalidArgument(f"{path} of {base.name} {description}", reason=Reason.MODEL_INVALID)
