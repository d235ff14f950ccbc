"""Which split a record belongs to: decided by the hash of what it asks first.

So records that ask the same are in one split, and adding records never moves another one.
"""

from __future__ import annotations

import hashlib

from luthier.v1 import dataset_pb2

SPLITS = (dataset_pb2.SPLIT_TRAIN, dataset_pb2.SPLIT_VALIDATION, dataset_pb2.SPLIT_TEST)
_PREFIX = "SPLIT_"
_HASH_RANGE = 2**64


def split_name(split: dataset_pb2.Split.ValueType) -> str:
    """Return a split as shards name it: TRAIN."""
    return dataset_pb2.Split.Name(split).removeprefix(_PREFIX)


def split_named(name: str) -> dataset_pb2.Split.ValueType:
    """Return the split that shards call `name`."""
    return dataset_pb2.Split.Value(_PREFIX + name)


def assign_split(key: str, settings: dataset_pb2.SplitSettings) -> dataset_pb2.Split.ValueType:
    """Return the split of the records of a key: a function of it, the seed and the shares, of nothing else.

    The key is the id of a record's prompt; of a record that asks nothing its own id. A greater test share only moves
    records into the test split, never out of it. The hash is the first 8 bytes of sha256(seed as decimal digits, a
    newline, key), taken as a fraction of 2^64.
    """
    digest = hashlib.sha256(f"{settings.seed}\n{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / _HASH_RANGE
    if position < settings.test_fraction:
        return dataset_pb2.SPLIT_TEST
    if position < settings.test_fraction + settings.validation_fraction:
        return dataset_pb2.SPLIT_VALIDATION
    return dataset_pb2.SPLIT_TRAIN
