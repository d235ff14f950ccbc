"""Read the rows of a rendering from the Data service and check that they are the ones that were planned with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pyarrow.compute

from luthier.errors import DataLoss
from luthier.training.recipe_settings import mixture_of
from luthier.training.recipes.corpus import Block, Corpus, Split, joined
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.units import role_codes
from luthier.v1 import arrow_pb2, data_service_pb2, data_service_pb2_grpc, dataset_pb2, rendering_pb2
from luthier.work.arrow_stream import read_batches
from luthier.work.limited import Check
from luthier.work.peers import bearer
from luthier.work.pinned import require_pinned
from luthier.work.retry import Messages, Token, asked
from luthier.worker.v1 import task_pb2

_CALL_SECONDS = 30.0
_STREAM_SECONDS = 3600.0
_SPLITS: dict[Split, dataset_pb2.Split.ValueType] = {
    "TRAIN": dataset_pb2.SPLIT_TRAIN,
    "VALIDATION": dataset_pb2.SPLIT_VALIDATION,
}


def read_rows(
    channel: grpc.Channel, token: Token, spec: task_pb2.TrainSpec, check: Check
) -> tuple[Corpus, Mixture | None]:
    """Return the rows of all renderings of a job, and how they are mixed. Raises as `read_corpus`."""
    corpus = read_corpus(channel, token, spec.job.rendering, spec.rendering_digest, check)
    if not spec.job.mixed_renderings:
        return corpus, None
    pinned = zip(spec.job.mixed_renderings, spec.mixed_rendering_digests, strict=True)
    others = [read_corpus(channel, token, mixed.rendering, digest, check) for mixed, digest in pinned]
    whole, first_rows = joined([corpus, *others])
    return whole, mixture_of(spec.job, first_rows)


def read_corpus(
    channel: grpc.Channel,
    token: Token,
    name: str,
    digest: str,
    check: Check,
    see: Callable[[Any], None] = lambda _: None,
) -> Corpus:
    """Return the training and validation rows of a rendering.

    Args:
        channel: to the Data service.
        token: gives a fresh credential.
        name: the rendering.
        digest: what the job was planned with.
        check: called several times a second, whatever the service does; may raise to stop.
        see: given each record batch, with all its columns.

    Raises:
        DataLoss: the rendering has another digest, or its rows are not as many as it says.
        LuthierError: the service refused, or was away for too long (Unavailable).
    """
    stub: Any = data_service_pb2_grpc.DataServiceStub(channel)

    def planned_with() -> rendering_pb2.Rendering:
        return read_rendering(channel, token, name, digest, check)

    def open_at(row: int) -> Messages[arrow_pb2.ArrowChunk]:
        planned_with()  # each time, for streams break and renderings go
        wanted = data_service_pb2.ReadRenderingRequest(name=name, start_row=row)
        chunks: Messages[arrow_pb2.ArrowChunk] = stub.ReadRendering(
            wanted, metadata=bearer(token()), timeout=_STREAM_SECONDS
        )
        return chunks

    corpus = Corpus()
    for batch in read_batches(open_at, check):
        add_batch(corpus, batch)
        see(batch)
    _check_counts(corpus, planned_with())
    return corpus


def read_rendering(
    channel: grpc.Channel, token: Token, name: str, digest: str, check: Check
) -> rendering_pb2.Rendering:
    """Return a rendering that a job was planned with. Raises as `read_corpus`."""
    stub: Any = data_service_pb2_grpc.DataServiceStub(channel)
    request = data_service_pb2.GetRenderingRequest(name=name)
    rendering: rendering_pb2.Rendering = asked(
        lambda: stub.GetRendering.future(request, metadata=bearer(token()), timeout=_CALL_SECONDS), check
    )
    require_pinned(name, digest, rendering.digest)
    return rendering


def add_batch(corpus: Corpus, batch: Any) -> None:
    """Add a record batch; tokens go from Arrow's buffers into arrays, and never through Python's numbers.

    Raises:
        DataLoss: a row lacks tokens, or has not one flag for each.
    """
    for split in _SPLITS:
        part = batch.filter(pyarrow.compute.equal(batch.column("split"), split))
        if part.num_rows == 0:
            continue
        ids, mask = part.column("input_ids"), part.column("loss_mask")
        bounds, ends = (np.asarray(column.offsets, dtype=np.int64) for column in (ids, mask))
        tokens, flags = ids.flatten(), mask.flatten()
        nulls = ids.null_count + mask.null_count + tokens.null_count + flags.null_count
        if nulls or not np.array_equal(bounds - bounds[0], ends - ends[0]):
            raise DataLoss(
                f"each row must have a flag for each token, rows from {part.column('row')[0]} on have not",
                metadata={"row": str(part.column("row")[0])},
            )
        rows = _int64(part, "row")
        block = Block(
            rows=rows,
            # A Data service of before units has none: each row is its own.
            units=_int64(part, "unit") if "unit" in part.schema.names else rows,
            bounds=bounds - bounds[0],
            input_ids=tokens.to_numpy().astype(np.int32, copy=False),
            learnt=flags.to_numpy(zero_copy_only=False),
            roles=role_codes(part.column("role").to_pylist()) if "role" in part.schema.names else None,
        )
        corpus.add(split, block)


def _int64(batch: Any, name: str) -> Any:
    return batch.column(name).to_numpy().astype(np.int64, copy=False)


def _check_counts(corpus: Corpus, rendering: rendering_pb2.Rendering) -> None:
    told = {entry.split: entry.tokens for entry in rendering.split_statistics}
    for split, number in _SPLITS.items():
        lengths = corpus.lengths(split)
        read = (len(lengths), sum(lengths.num_tokens))
        expected = (told[number].count, told[number].sum) if number in told else (0, 0)
        if read != expected:
            raise DataLoss(
                f"{rendering.name} must have {expected[0]} rows of {split} with {expected[1]} tokens, "
                f"{read[0]} with {read[1]} arrived",
                metadata={"name": rendering.name, "split": split},
            )
