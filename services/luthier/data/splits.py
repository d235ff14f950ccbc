"""Which split a record belongs to: decided by its hash, so that adding records never moves another one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

_HASH_RANGE = 2**64


class Split(StrEnum):
    """What a record is used for."""

    TRAIN = "TRAIN"
    VALIDATION = "VALIDATION"
    TEST = "TEST"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSettings:
    """Shares of the records whose source fixes no split, each in [0, 1), together below 1; others train."""

    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    seed: int = 0


def assign_split(record_id: str, settings: SplitSettings) -> Split:
    """Return the split of a record: a function of its id, the seed and the shares, of nothing else.

    A greater test share only moves records into the test split, never out of it. The hash is the first 8
    bytes of sha256(seed as decimal digits, a newline, record id), taken as a fraction of 2^64.
    """
    digest = hashlib.sha256(f"{settings.seed}\n{record_id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / _HASH_RANGE
    if position < settings.test_fraction:
        return Split.TEST
    if position < settings.test_fraction + settings.validation_fraction:
        return Split.VALIDATION
    return Split.TRAIN
