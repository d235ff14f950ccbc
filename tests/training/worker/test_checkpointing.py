"""A job says how much its layers keep of a pass, and learns the same bits whatever it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.training.worker.conftest import Site

from luthier.lm.checkpointing import checkpointed_layers
from luthier.training.recipes.engine import Engine
from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_FULL,
    ACTIVATION_CHECKPOINTING_NONE,
    ACTIVATION_CHECKPOINTING_SELECTIVE,
    FineTuningJob,
)


async def test_what_layers_keep_changes_no_bit_of_a_job(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = Engine.accumulate

    def accumulate(engine: Engine, *arguments: Any) -> Any:
        layers = checkpointed_layers(engine.weights.model)
        seen.append(all("forward" in layer.__dict__ for layer in layers))
        return real(engine, *arguments)

    monkeypatch.setattr(Engine, "accumulate", accumulate)
    digests, metrics, checkpointed = [], [], []
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        for number, kept in enumerate(
            (
                ACTIVATION_CHECKPOINTING_NONE,
                ACTIVATION_CHECKPOINTING_SELECTIVE,
                ACTIVATION_CHECKPOINTING_FULL,
            )
        ):
            seen.clear()
            job = await site.create(f"job-{number}", max_steps=3, activation_checkpointing=kept)
            ended = await site.ended(job.name)
            assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
            digests.append([point.digest for point in await site.checkpoints(job.name)])
            metrics.append(await site.metrics(job.name))
            checkpointed.append(set(seen))
    assert digests[0] == digests[1] == digests[2] != []
    assert metrics[0] == metrics[1] == metrics[2]
    assert checkpointed == [{False}, {True}, {True}]
