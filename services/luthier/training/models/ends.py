"""The file by which other programs end a tuned model's answers where they are ended here."""

from __future__ import annotations

import json
from typing import Any

from luthier.errors import InvalidArgument, Reason
from luthier.v1.model_pb2 import Model, Taught

GENERATION_CONFIG = "generation_config.json"
_KEY = "eos_token_id"


def generation_config(base: Model, taught: Taught, settings: bytes) -> bytes:
    """Return the generation config of a model that was tuned on a base: every token that ends its answers is in it.

    These are the base's, and those that it was taught to end answers with. `settings` is the base's own file; empty:
    there is none. It stays as it is, byte for byte, where it names them all; where nobody names any there is none.

    Raises:
        InvalidArgument: MODEL_INVALID; the base's file is no JSON object, or its `eos_token_id` no id and no list.
    """
    read = _read(base, settings) if settings else {}
    named = _named(base, read.get(_KEY))
    ends = list(dict.fromkeys((*named, *base.eos_token_ids, *taught.stop_token_ids)))
    if ends == named:
        return settings
    return json.dumps(read | {_KEY: ends}, indent=2, sort_keys=True).encode() + b"\n"


def _read(base: Model, settings: bytes) -> dict[str, Any]:
    try:
        read = json.loads(settings)
    except ValueError as error:
        raise _invalid(base, f"must be JSON: {error}") from error
    if not isinstance(read, dict):
        raise _invalid(base, f"must be an object, got {type(read).__name__}")
    return read


def _named(base: Model, value: object) -> list[int]:
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in ids if not isinstance(one, int) or isinstance(one, bool)]:
        raise _invalid(base, f"must have token ids in {_KEY}, got {wrong[0]!r}")
    return ids


def _invalid(base: Model, description: str) -> InvalidArgument:
    return InvalidArgument(f"{GENERATION_CONFIG} of {base.name} {description}", reason=Reason.MODEL_INVALID)
