"""Which fields of what is stored, and of what workers name, are digests of blobs: each says it here.

Bytes that no row of `blob_refs` names are collected, and rows are written for the fields that `digests_in` finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from luthier.storage.blob_refs import digests_in
from luthier.stored.v1 import data_pb2, evaluation_pb2, training_pb2
from luthier.worker.v1 import worker_service_pb2

Path = tuple[FieldDescriptor, ...]

BLOBS = {
    "luthier.stored.v1.PredictionFile.sha256",
    "luthier.stored.v1.RenderingPrivate.tokenizer_sha256",
    "luthier.stored.v1.UploadPrivate.sha256",
    "luthier.v1.ModelFile.sha256",
    "luthier.worker.v1.BlobFile.sha256",
}
"""Whoever stores one needs its bytes."""

OTHERS = {
    "luthier.stored.v1.FineTuningJobPrivate.base_model_digest": "of a model, whose files the model needs",
    "luthier.stored.v1.FineTuningJobPrivate.mixed_rendering_digests": "of renderings, whose rows they need",
    "luthier.stored.v1.FineTuningJobPrivate.rendering_digest": "of a rendering, whose rows it needs",
    "luthier.stored.v1.RenderingPrivate.model_digest": "of a model of the Training service",
    "luthier.v1.ArmResult.template_digest": "of a template's text",
    "luthier.v1.Taught.rendering_digest": "of a rendering of the Data service",
    "luthier.v1.Taught.tokenizer_digest": "of the names and digests of a tokenizer's files",
    "luthier.worker.v1.BuildVersionResult.digest": "of a version's records and settings",
    "luthier.worker.v1.ModelReference.digest": "of a model of the Training service",
    "luthier.worker.v1.RegisterModelResult.tokenizer_digest": "of the names and digests of a tokenizer's files",
    "luthier.worker.v1.RenderResult.digest": "of a rendering's rows and settings",
    "luthier.worker.v1.TrainingVersion.digest": "of a dataset version of the Data service",
}
"""What each is the digest of: no blob of the service that stores it has that name."""

STORED = [
    descriptor
    for file in (data_pb2, evaluation_pb2, training_pb2)
    for descriptor in file.DESCRIPTOR.message_types_by_name.values()
]
NAMED = [
    getattr(worker_service_pb2, f"{method}Request").DESCRIPTOR
    for method in ("CommitCheckpoint", "CommitRollouts", "FinishTask")
]


def is_digest(field: FieldDescriptor) -> bool:
    return any(word in field.name for word in ("sha256", "digest", "hash", "blob"))


def fields_below(descriptor: Descriptor, before: Path = ()) -> Iterator[Path]:
    """Yield the fields that lead to each that is no message; types that hold themselves are looked at once."""
    for field in descriptor.fields:
        path = (*before, field)
        inner = field.message_type
        if inner is None:
            yield path
        elif inner not in [one.containing_type for one in path]:
            yield from fields_below(inner, path)


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


DIGESTS = [path for root in (*STORED, *NAMED) for path in fields_below(root) if is_digest(path[-1])]


def test_every_digest_is_of_a_blob_or_says_of_what_else() -> None:
    found = {path[-1].full_name for path in DIGESTS}
    assert found - BLOBS - OTHERS.keys() == set(), "say whether the new field names a blob, and here why not"
    assert (BLOBS | OTHERS.keys()) - found == set(), "no such field any more"
    assert BLOBS.isdisjoint(OTHERS)


def test_a_blob_is_a_text_that_no_map_hides() -> None:
    """`digests_in` does not look into maps."""
    assert {path[-1].type for path in DIGESTS} == {FieldDescriptor.TYPE_STRING}
    hidden = {path[-1].full_name for path in DIGESTS if any(map(is_map, path))}
    assert hidden & BLOBS == set()


@pytest.mark.parametrize("path", DIGESTS, ids=lambda path: "-".join(field.name for field in path))
def test_what_is_a_blob_is_found_wherever_it_stands_and_nothing_else(path: Path) -> None:
    root = path[0].containing_type
    assert root is not None
    message: Any = GetMessageClass(root)()
    holder = message
    for field in path[:-1]:
        held = getattr(holder, field.name)
        holder = held.add() if field.is_repeated else held
        holder.SetInParent()
    value = "a" * 64
    if path[-1].is_repeated:
        getattr(holder, path[-1].name).append(value)
    else:
        setattr(holder, path[-1].name, value)
    assert list(digests_in(message)) == [value] * (path[-1].full_name in BLOBS)
