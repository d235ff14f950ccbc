"""Samples valued by reward models, which workers have: the service itself loads none."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from luthier.errors import Internal
from luthier.evaluation import reward_models
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.reward_models import FoundReward, Models
from luthier.runtime.auth import TaskTokens
from luthier.runtime.names import project_of
from luthier.v1.grader_pb2 import Sample, SampleGrade
from luthier.work.rewards import batches
from luthier.worker.v1.worker_service_pb2 import GenerationOrder

_TOKEN_SECONDS = 900.0
_SAMPLES_AN_ORDER = 64
_BYTES_AN_ORDER = 2 << 20
"""Beside a chat template of a MiB they fit in one message."""


class Values:
    """Finds reward models, and places the orders."""

    def __init__(self, exchange: Exchange, models: Models, task_tokens: TaskTokens) -> None:
        self._exchange = exchange
        self._models = models
        self._task_tokens = task_tokens

    async def find(self, named: Iterable[tuple[str, str]]) -> dict[str, FoundReward]:
        """Return reward models, each given after its field, by their names. Raises as `reward_models.find`."""
        return await reward_models.find(self._models, named)

    async def of(self, found: FoundReward, samples: Sequence[Sample]) -> list[SampleGrade]:
        """Return what a reward model values each sample at, in their order: a score, or why there is none.

        Raises:
            Unavailable: NO_WORKER, or the worker went away.
            ResourceExhausted: OVERLOADED, too many orders wait.
            LuthierError: what the worker could not do.
        """
        grades: list[SampleGrade] = []
        for batch in batches(samples, _SAMPLES_AN_ORDER, _BYTES_AN_ORDER):
            grades += await self._ordered(found, batch)
        return grades

    async def _ordered(self, found: FoundReward, samples: Sequence[Sample]) -> list[SampleGrade]:
        told = found.told(datetime.now(UTC).date())
        generation_id = uuid.uuid4().hex
        names = tuple({found.base.name, found.model.name})
        project = project_of(found.model.name)
        order = GenerationOrder(
            generation=generation_id,
            base_model=told.base_model,
            adapter=told.adapter if told.HasField("adapter") else None,
            token=self._task_tokens.mint(project, names, 0, generation_id, _TOKEN_SECONDS),
            asking=told.asking,
            base_precision=told.base_precision,
            context_length=told.context_length,
        )
        order.samples.samples.extend(samples)
        grades: list[SampleGrade] = []
        async for piece in self._exchange.generate(order):
            grades += piece.values
        if len(grades) != len(samples):
            raise Internal(
                f"the worker must give {len(samples)} values, it gave {len(grades)}; is it an older one?"
            )
        return grades
