"""Moments as a job says, by a worker of a real Training service: what its checkpoints hold, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load_file
from tests.stores import service_urls
from tests.training.worker.conftest import Site, stop_after_a_checkpoint
from tests.training.worker.test_in_child import assert_same
from tests.training.worker.test_methods import registered
from tests.training.worker.test_weights import _digests, ended, full_job
from torch import Tensor

from luthier.training.recipes import footprint
from luthier.v1.fine_tuning_job_pb2 import OPTIMISER_STATES_INT8, FineTuningJob


def stored_moments(site: Site, job_id: str) -> dict[str, Tensor]:
    """Return what the last checkpoint of a job holds of its optimiser."""
    blobs = Path(urlsplit(service_urls(site.home, "training")["blobs_url"]).path)
    [path] = blobs.rglob(_digests(site, "optimizer.safetensors")[job_id])
    return load_file(path)


async def test_moments_of_8_bits_are_learnt_with_and_stored_and_go_on_with_the_same_bits(
    site: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "_LEAST_IN_8_BITS", 1024)  # matrices of the tiny model are large enough
    wanted = full_job(optimiser_states=OPTIMISER_STATES_INT8)
    async with site.worker():
        await registered(site, model_folder)
        plain = await ended(site, "plain", full_job())
        whole = await ended(site, "whole", wanted)
    broken = await site.create_job("broken", wanted)
    await stop_after_a_checkpoint(site, broken.name)
    async with site.worker():
        again = await site.ended(broken.name)
    assert (again.state, again.num_attempts) == (FineTuningJob.STATE_SUCCEEDED, 2), again.error
    await assert_same(site, whole.name, broken.name)
    assert await site.metrics(whole.name) != await site.metrics(plain.name), "they are others than float32"
    held = {job_id: stored_moments(site, job_id) for job_id in ("plain", "whole")}
    codes = [name for name in held["whole"] if name.endswith(".codes")]
    assert "model.layers.0.mlp.up_proj.weight.exp_avg.codes" in codes
    assert all(held["whole"][name].dtype == torch.uint8 for name in codes)
    assert not [name for name in held["plain"] if name.endswith(".codes")]
