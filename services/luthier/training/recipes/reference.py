"""Log-probabilities of a reference: from the model in the same step, or computed once before training and stored.

An adapter's reference is the model without it, or with the adapter that it began as: one more pass without gradients.
All weights change, so that theirs are computed before the first step and kept in a file that every resume reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import TokenLogprobs
from luthier.training.recipes.batches import pack_first_fit, teaching_units
from luthier.training.recipes.collective import dealt
from luthier.training.recipes.corpus import Corpus, Split
from luthier.training.recipes.engine import Engine
from luthier.training.recipes.objectives import REFERENCE

FILE_NAME = "reference_logprobs.safetensors"
_SPLITS: tuple[Split, ...] = ("TRAIN", "VALIDATION")
_KEY = "key"
_LOGPROBS = TokenLogprobs()


def with_reference(engine: Engine, batch: PackedBatch, readout: TokenLogprobs = _LOGPROBS) -> PackedBatch:
    """Return a batch whose stream `REFERENCE` has the reference's log-probability of each learnt token, 0 elsewhere.

    They are read as `readout` reads those that are compared with them.
    """
    if REFERENCE in batch.streams:
        return batch
    reference = engine.weights.reference()
    assert reference is not None, (
        "weights that keep no reference train on a corpus that has its log-probabilities"
    )
    with reference:
        return _scored(engine, batch, readout)


def reference_key(identity: Mapping[str, str]) -> str:
    """Return a sha256 in hex of what stored values are of: rendering, start model, micro-batches."""
    lines = [f"{name}={value}\n" for name, value in sorted(identity.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def score_reference(
    engine: Engine,
    corpus: Corpus,
    micro_batch_tokens: int,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Give every learnt token of a corpus the log-probability that the engine's weights give it now.

    To be called before the first step and before a checkpoint is loaded. Before each pass `check` is called, and `tell`
    with how many rows are scored and how many will be, of all ranks: they share the passes, and each has all values
    then, those that one rank alone would find.
    """
    passes = {
        split: pack_first_fit(teaching_units(corpus.lengths(split)), micro_batch_tokens) for split in _SPLITS
    }
    num_rows = sum(len(rows) for of_split in passes.values() for rows in of_split)
    num_before = 0
    for split in _SPLITS:
        lengths = corpus.lengths(split)
        starts = np.cumsum([0, *lengths.num_tokens])
        first = {row: int(start) for row, start in zip(lengths.rows, starts[:-1], strict=True)}
        values = np.zeros(starts[-1], dtype=np.float32)
        scored = list(accumulate(map(len, passes[split]), initial=num_before))
        num_before = scored[-1]
        for number, (rows, counts) in enumerate(dealt(passes[split], engine.collective)):
            check()
            # The others are about as far: passes go round.
            tell(scored[number * engine.collective.num_ranks], num_rows)
            batch = _scored(engine, corpus.pack(rows, split))
            if not counts:
                continue
            stream = batch.streams[REFERENCE].cpu().numpy()
            for row, begin, end in zip(rows, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                values[first[row] : first[row] + end - begin] = stream[begin:end]
        # Each value is one rank's, and 0 on the others.
        shared = torch.from_numpy(values).to(engine.weights.model.device)
        engine.collective.sum_gradients([shared])
        corpus.set_stream(REFERENCE, split, shared.cpu().numpy())


def save_reference(corpus: Corpus, folder: Path, key: str) -> None:
    """Write what `score_reference` found into a folder, made if missing; equal values give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, NDArray[np.float32]] = {split: corpus.stream(REFERENCE, split) for split in _SPLITS}
    save_file(tensors, folder / FILE_NAME, metadata={_KEY: key})


def load_reference(corpus: Corpus, folder: Path, key: str) -> None:
    """Give a corpus what `save_reference` wrote.

    Raises:
        DataLoss: the file is not as `save_reference` writes it for these rows.
        FailedPrecondition: it is of other rows or another start model (DATA_CORRUPTED).
    """
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            found_key = (file.metadata() or {}).get(_KEY)
            values = {split: file.get_tensor(split) for split in _SPLITS}
    # What safetensors raises is a class of its own for some files, and the system's for others.
    except Exception as error:
        raise DataLoss(f"{FILE_NAME} cannot be read: {error}") from error
    if found_key != key:
        raise FailedPrecondition(
            f"{FILE_NAME} must be of this run's rows and start model, got one of others",
            reason=Reason.DATA_CORRUPTED,
            metadata={"expected": key, "found": str(found_key)},
        )
    for split in _SPLITS:
        num_tokens = sum(corpus.lengths(split).num_tokens)
        if values[split].shape != (num_tokens,) or values[split].dtype != np.float32:
            raise DataLoss(f"{FILE_NAME} must have a float32 for each of the {num_tokens} tokens of {split}")
        corpus.set_stream(REFERENCE, split, values[split])


def _scored(engine: Engine, batch: PackedBatch, readout: TokenLogprobs = _LOGPROBS) -> PackedBatch:
    scores = engine.score(batch, readout)
    stream_T = torch.zeros(len(batch.input_ids), device=scores.logprob.device)
    stream_T[scores.position + 1] = scores.logprob
    return replace(batch, streams={**batch.streams, REFERENCE: stream_T})
