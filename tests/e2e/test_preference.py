"""Answers that people compared or labelled, from a file to a tuned model, as every caller takes that way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import WAIT, Shared, job

from luthier.client import Client
from luthier.errors import FailedPrecondition, Reason
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION, DatasetFormat, DatasetSource
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, PreferenceConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_UNPAIRED,
    Rendering,
    RenderingKind,
)

pytestmark = pytest.mark.e2e
STEPS = 12


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"colour of thing {number}?"}]


def answer(word: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": word}]


def labelled(numbers: range) -> list[Any]:
    """Every other answer is a good one: the same word is always good, the other always bad."""
    return [
        {
            "prompt": question(number),
            "completion": answer("blue" if number % 2 else "grass"),
            "label": bool(number % 2),
        }
        for number in numbers
    ]


def compared(numbers: range) -> list[Any]:
    return [
        {"prompt": question(number), "chosen": answer("blue"), "rejected": answer("grass")}
        for number in numbers
    ]


def version_of(client: Client, folder: Path, name: str, train: list[Any], validation: list[Any]) -> Any:
    client.datasets.create(name)
    sources = []
    for part, records, split in (("train", train, SPLIT_TRAIN), ("val", validation, SPLIT_VALIDATION)):
        path = folder / f"{name}-{part}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        sources.append(DatasetSource(upload=client.datasets.upload(path).name, split=split))
    made = client.datasets.create_version(name, sources)
    return client.datasets.versions.wait(made.name, timeout_seconds=WAIT)


def rendered(client: Client, version: str, kind: RenderingKind.ValueType) -> Rendering:
    made = client.renderings.create(Rendering(dataset_version=version, model="tiny", kind=kind))
    return client.renderings.wait(made.name, timeout_seconds=WAIT)


def preferring(rendering: str, loss: PreferenceConfig.Loss.ValueType) -> FineTuningJob:
    wanted = job(rendering, STEPS, checkpoint_interval_steps=STEPS)
    wanted.hyperparameters.learning_rate = 2e-2
    wanted.preference.CopyFrom(PreferenceConfig(loss=loss))
    return wanted


def tuned(client: Client, name: str, wanted: FineTuningJob) -> tuple[Any, Any]:
    """Run a job to its end; return its first and its last metrics."""
    plan = client.jobs.plan(wanted)
    client.jobs.create(wanted, job_id=name)
    ended = client.jobs.wait(name, timeout_seconds=WAIT)
    points = [point.values for point in client.jobs.metrics(name)]
    assert len(points) == plan.num_steps == STEPS
    model = client.models.get(ended.tuned_model)
    assert (model.state, model.fine_tuning_job) == (Model.STATE_READY, ended.name)
    return points[0], points[-1]


def test_labelled_answers_go_from_a_file_to_a_model_that_prefers_the_good_ones(
    tuning: Shared, tmp_path: Path
) -> None:
    with tuning.cluster.client() as client:
        version = version_of(client, tmp_path, "labelled", labelled(range(24)), labelled(range(40, 46)))
        formats = {DatasetFormat.Name(one.detected_format) for one in version.sources}
        rendering = rendered(client, version.name, RENDERING_KIND_UNPAIRED)
        counts = {one.split: one for one in rendering.split_statistics}
        first, last = tuned(client, "labelled", preferring(rendering.name, PreferenceConfig.LOSS_KTO))
        with pytest.raises(FailedPrecondition) as caught:
            client.jobs.create(preferring(rendering.name, PreferenceConfig.LOSS_DPO))
    assert formats == {"DATASET_FORMAT_UNPAIRED"}
    assert (counts[SPLIT_TRAIN].num_units, counts[SPLIT_TRAIN].tokens.count) == (24, 48)
    assert {one.role for one in counts[SPLIT_TRAIN].roles} == {"desirable", "undesirable", "mismatched"}
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-3)
    assert last["validation_reward_margin"] > 0.05
    assert {"kl", "validation_kl", "validation_loss", "reward_chosen", "reward_rejected"} <= last.keys()
    assert caught.value.reason == Reason.RENDERING_KIND_MISMATCH


def test_pairs_go_from_a_file_to_a_model_that_prefers_what_was_chosen(tuning: Shared, tmp_path: Path) -> None:
    with tuning.cluster.client() as client:
        version = version_of(client, tmp_path, "compared", compared(range(24)), compared(range(40, 46)))
        formats = {DatasetFormat.Name(one.detected_format) for one in version.sources}
        rendering = rendered(client, version.name, RENDERING_KIND_PREFERENCE)
        counts = {one.split: one for one in rendering.split_statistics}
        first, last = tuned(client, "compared", preferring(rendering.name, PreferenceConfig.LOSS_DPO))
        with pytest.raises(FailedPrecondition) as caught:
            client.jobs.create(preferring(rendering.name, PreferenceConfig.LOSS_KTO))
    assert formats == {"DATASET_FORMAT_PREFERENCE"}
    assert (counts[SPLIT_TRAIN].num_units, counts[SPLIT_TRAIN].tokens.count) == (24, 48)
    assert {one.role for one in counts[SPLIT_TRAIN].roles} == {"chosen", "rejected"}
    assert first["reward_margin"] == pytest.approx(0.0, abs=1e-3)
    assert last["validation_reward_accuracy"] == 1.0
    assert last["validation_reward_margin"] > 0.05
    assert caught.value.reason == Reason.RENDERING_KIND_MISMATCH
