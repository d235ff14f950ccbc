"""The divergence of tuned arms from the baseline with all words counted, at some of the tokens that it drew itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.errors.status import failure_to_status
from luthier.evaluation.worker.answered import Answered
from luthier.evaluation.worker.loaded_model import LoadedModel
from luthier.evaluation.worker.order import Measured
from luthier.evaluation.worker.questions import failure_of
from luthier.text.rendering import Rendered
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2

MAX_TOKENS = 256
"""Tokens that are compared at most: each takes 4 bytes for each word of the vocabulary."""
MAX_TEXTS = 64
"""Answers that they are of at most: tokens of one answer go together, so that many answers tell more."""
_FILE = "distributions"


class ExactDrift:
    """Keeps the baseline's distributions in a file of the task's folder, and holds those of arms against them.

    Args:
        context: the task.
        answered: what is found so far, of this too.
    """

    def __init__(self, context: TaskContext, answered: Answered) -> None:
        self._context = context
        self._answered = answered
        self._texts: list[Rendered] = []

    def keep(
        self, loaded: LoadedModel, adapter: str | None, texts: Sequence[Rendered], keys: Sequence[str]
    ) -> None:
        """Keep what the baseline thinks of each word at the chosen tokens of texts; `keys` are what will ask.

        Where all of them is known from an earlier attempt nothing is computed.
        """
        self._texts = list(texts)
        if any(self._is_missing(key) for key in keys):
            path = self._context.scratch / _FILE
            loaded.engine.distribute(self._wanted(adapter), path, self._context.check)

    def compare(self, loaded: LoadedModel, adapter: str | None, key: str) -> list[task_pb2.AnsweredRecord]:
        """Return by how many nats an arm differs on each text, as records of its `nll`; what fails says why."""
        if self._is_missing(key):
            batch = task_pb2.AnsweredBatch(arm_id=key, records=self._compared(loaded, adapter))
            self._answered.add(batch)
        return [record for batch in self._answered.of(key) for record in batch.records]

    def _compared(self, loaded: LoadedModel, adapter: str | None) -> list[task_pb2.AnsweredRecord]:
        path = self._context.scratch / _FILE
        try:
            found = loaded.engine.divergences(self._wanted(adapter), path, self._context.check)
            if wrong := [one.nats for one in found if not math.isfinite(one.nats)]:
                raise FailedPrecondition(
                    f"the divergence of each text must be a finite number, got {wrong[0]}; the model's weights or its "
                    "adapter are broken",
                    reason=Reason.MODEL_INVALID,
                )
        except (InvalidArgument, FailedPrecondition) as error:
            if error.reason == Reason.LEASE_LOST:
                raise
            status = failure_to_status(failure_of(error))
            return [task_pb2.AnsweredRecord(row=row, error=status) for row in range(len(self._texts))]
        return [
            task_pb2.AnsweredRecord(row=row, nll=one.nats, num_reference_tokens=one.num_tokens)
            for row, one in enumerate(found)
        ]

    def _wanted(self, adapter: str | None) -> Measured:
        return Measured(
            adapter=adapter,
            sequences=[text.input_ids for text in self._texts],
            masks=[text.loss_mask for text in self._texts],
        )

    def _is_missing(self, key: str) -> bool:
        return bool(self._answered.missing(key, range(1)))


def chosen(texts: Mapping[int, Rendered], seed: int) -> list[Rendered]:
    """Return texts with fewer of their tokens chosen, `MAX_TOKENS` of them all at most, and of as many as there are.

    Texts and their tokens are chosen by a hash of seed, row and place: the same for each arm and each attempt.
    """

    def key(*places: int) -> bytes:
        return hashlib.sha256("/".join(map(str, (seed, *places))).encode()).digest()

    rows = sorted(texts, key=key)[:MAX_TEXTS]
    return [
        replace(
            texts[row], loss_mask=_thinned(texts[row].loss_mask, MAX_TOKENS // len(rows), partial(key, row))
        )
        for row in rows
    ]


def _thinned(mask: Sequence[bool], most: int, key: Callable[[int], bytes]) -> tuple[bool, ...]:
    # Nothing stands before the first token of all: it is foretold from nothing.
    places = sorted((place for place, is_chosen in enumerate(mask) if is_chosen and place), key=key)
    kept = set(places[:most])
    return tuple(place in kept for place in range(len(mask)))
