"""A job that mixes two renderings: planned, killed and gone on with, the same as one left alone."""

from __future__ import annotations

import pytest
from tests.e2e.conftest import WAIT, Shared, job, write_examples
from tests.e2e.test_kill import assert_same_run, when_step

from luthier.client import Client
from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION, DatasetSource
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, RenderingShare
from luthier.v1.rendering_pb2 import Rendering

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("checked_in_the_end")]
STEPS, INTERVAL = 40, 10


def general(shared: Shared, client: Client) -> str:
    """A second rendering with the same tokenizer, of things that the first does not know, some for validation."""
    client.datasets.create("general")
    sources = []
    for name, count, start, split in (
        ("general", 20, 500, SPLIT_TRAIN),
        ("general-validation", 6, 600, SPLIT_VALIDATION),
    ):
        path = write_examples(shared.cluster.home / f"{name}.jsonl", count, start)
        sources.append(DatasetSource(upload=client.datasets.upload(path).name, split=split))
    version = client.datasets.create_version("general", sources)
    client.datasets.versions.wait(version.name, timeout_seconds=WAIT)
    made = client.renderings.create(
        Rendering(dataset_version=version.name, model="tiny"), rendering_id="general"
    )
    return client.renderings.wait(made.name, timeout_seconds=WAIT).name


def mixed(rendering: str, other: str, share: float = 0.25) -> FineTuningJob:
    wanted = job(rendering, STEPS, checkpoint_interval_steps=INTERVAL, max_checkpoints=10)
    wanted.mixed_renderings.append(RenderingShare(rendering=other, share=share))
    return wanted


def test_a_mixed_job_ends_with_the_same_bits_when_its_worker_is_killed(tuning: Shared) -> None:
    cluster, rendering = tuning.cluster, tuning.rendering
    with cluster.client() as client:
        other = general(tuning, client)
        plan = client.jobs.plan(mixed(rendering, "general"))
        client.jobs.create(mixed(rendering, "general"), job_id="mixed-alone")
        alone = client.jobs.wait("mixed-alone", timeout_seconds=WAIT)

        client.jobs.create(mixed(rendering, "general"), job_id="mixed-killed")
        when_step(client, "mixed-killed", INTERVAL + 3, lambda: cluster.kill("training-worker"))
        with pytest.raises(FailedPrecondition) as caught:
            client.renderings.delete("general")
        cluster.start("training-worker")
        killed = client.jobs.wait("mixed-killed", timeout_seconds=WAIT)

        assert (alone.num_attempts, killed.num_attempts) == (1, 2)
        assert_same_run(client, "mixed-alone", "mixed-killed")
        assert caught.value.reason == Reason.RESOURCE_IN_USE
        assert (
            list(alone.run_record.renderings) == list(plan.renderings) == list(killed.run_record.renderings)
        )
        assert [one.rendering for one in plan.renderings] == [rendering, other]
        assert plan.renderings[1].reached_share == pytest.approx(0.25, abs=0.02)
        points = list(client.jobs.metrics("mixed-alone"))
        assert len(points) == plan.num_steps == STEPS
        assert sum(point.values["num_tokens"] for point in points) == plan.num_tokens
        assert points[-1].values["validation_loss_1"] < points[0].values["train_loss"]
        assert "validation_loss" not in points[-1].values, "the first rendering has no validation rows"
        assert {one.name for one in alone.references} >= {rendering, other}


def test_shares_that_do_not_add_up_are_refused_with_their_sum(tuning: Shared) -> None:
    wanted = mixed(tuning.rendering, "general")
    wanted.rendering_share = 0.5
    with tuning.cluster.client() as client, pytest.raises(InvalidArgument) as caught:
        client.jobs.create(wanted)
    assert caught.value.reason == Reason.SHARES_DO_NOT_ADD_UP
    assert caught.value.message == (
        "fine_tuning_job.mixed_renderings: shares must add up to 1, rendering_share with them, got 0.75 (0.5 + 0.25)"
    )
