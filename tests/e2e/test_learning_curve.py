"""One call from a job to whether more data would help; made again after a break it goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tests.e2e.conftest import WAIT, Shared, job
from tests.e2e.test_own_file import luthier
from tests.e2e.typescript_suites import NEEDS_NODE, run_suite

from luthier.client.report import collect_report, render_report
from luthier.errors import AlreadyExists, InvalidArgument
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.evaluation_pb2 import (
    EVALUATION_METRIC_EXACT_MATCH,
    EVALUATION_METRIC_FIELD_MATCH,
    Evaluation,
    EvaluationArm,
)

pytestmark = pytest.mark.e2e
SHARES = (0.25, 0.5, 1.0)
SECTIONS = ("Results", "What it cost", "Would more data help?", "Training:", "Answers side by side")
"""What decides first, then how it came about, and answers."""


def wanted() -> Evaluation:
    return Evaluation(
        arms=[EvaluationArm(arm_id="zero", model="tiny")],
        metrics=[EVALUATION_METRIC_FIELD_MATCH],
        max_new_tokens=16,
        primary_score="field_match.fields",
    )


def test_three_jobs_and_an_evaluation_make_a_curve(whole: Shared, tmp_path: Path) -> None:
    cluster = whole.cluster
    with cluster.client() as client:
        told: list[str] = []
        tuned = job(whole.rendering, 12, checkpoint_interval_steps=12)
        found = client.learning_curve(tuned, wanted(), curve_id="more", shares=SHARES, tell=told.append)
        whole_version = client.renderings.get(whole.rendering).dataset_version
        every = {one.record_id for one in client.datasets.versions.records(whole_version, split=SPLIT_TRAIN)}
        parts = [
            {one.record_id for one in client.datasets.versions.records(f"more/{part}", split=SPLIT_TRAIN)}
            for part in ("p25", "p50")
        ]
        assert parts[0] < parts[1] < every
        sizes = [len(part) for part in (*parts, every)]
        assert [point.num_records for point in found.points] == sizes
        assert [point.arm_id for point in found.points] == ["p25", "p50", "p100"]
        assert [arm.arm_id for arm in found.evaluation.arms] == ["zero", "p25", "p50", "p100"]
        assert found.evaluation.candidate_arm_id == "p100"
        assert {one.count for one in found.evaluation.comparisons} == {found.evaluation.num_records}
        assert "each doubling has changed field_match.fields by" in found.words
        assert client.jobs.get("more-p50").labels["learning-curve-records"] == str(sizes[1])
        assert [line for line in told if line.startswith("tuning on")]
        # The same call finds all of it.
        jobs_before = [one.name for one in client.jobs.list()]
        again = client.learning_curve(tuned, wanted(), curve_id="more", shares=SHARES)
        assert again == found
        assert [one.name for one in client.jobs.list()] == jobs_before
        report = render_report(collect_report(client, found.evaluation.name))
    places = [report.index(f"<h2>{one}") for one in SECTIONS]
    assert places == sorted(places)

    path = tmp_path / "job.json"
    path.write_text(json.dumps({"base_model": "tiny", "rendering": whole.rendering}))
    shown = luthier(
        cluster,
        *("jobs", "learning-curve", "-f", str(path), "--name", "more", "--max-steps", "12"),
        *(word for share in SHARES for word in ("--share", str(share))),
        *("--arm", "zero=tiny", "--metric", "field-match"),
    )
    assert shown["name"] == found.evaluation.name


def test_what_cannot_be_a_curve_is_refused(whole: Shared) -> None:
    with whole.cluster.client() as client:
        client.jobs.create(job(whole.rendering, 1), job_id="taken-p50")
        client.jobs.wait("taken-p50", timeout_seconds=WAIT)
        with pytest.raises(
            AlreadyExists, match="taken-p50 exists and is no part of the learning curve taken"
        ):
            client.learning_curve(job(whole.rendering, 1), wanted(), curve_id="taken", shares=(0.5, 1.0))
        for shares, message in (
            ((1.0,), "must be 2 to 8 different shares above 0 and at most 1, got 1"),
            ((0.5, 1.5), "got 0.5, 1.5"),
            ((0.001, 1.0), "must be parts of different sizes of .* train records"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                client.learning_curve(job(whole.rendering, 1), wanted(), curve_id="no", shares=shares)
        other = job(whole.rendering, 12, checkpoint_interval_steps=12)
        other.hyperparameters.seed = 5
        with pytest.raises(
            AlreadyExists,
            match=r"more/versions/p25 exists and is not .* records of .* as seed 5 chooses them",
        ):
            client.learning_curve(other, wanted(), curve_id="more", shares=SHARES)
        mixed = job(whole.rendering, 1)
        mixed.mixed_renderings.add(rendering=whole.rendering, share=0.5)
        with pytest.raises(InvalidArgument, match="mixed_renderings: must be empty"):
            client.learning_curve(mixed, wanted(), curve_id="no")


@pytest.mark.long
@NEEDS_NODE
def test_what_the_typescript_client_makes_is_the_curve_that_this_client_would_make(
    whole: Shared, tmp_path: Path
) -> None:
    cluster, file = whole.cluster, tmp_path / "curve.json"
    run_suite("learning-curve", cluster.environment() | {"CURVE_FILE": str(file)})
    made = json.loads(file.read_text())
    with cluster.client() as client:
        origin = client.renderings.get(made["rendering"]).dataset_version
        every = [one.record_id for one in client.datasets.versions.records(origin, split=SPLIT_TRAIN)]
        every.sort(key=lambda record: hashlib.sha256(f"0/{record}".encode()).digest())
        for part, count in (("p25", 12), ("p50", 23)):
            records = client.datasets.versions.records(f"tsl-more/{part}", split=SPLIT_TRAIN)
            assert {one.record_id for one in records} == set(every[:count])
        before = [one.name for one in client.jobs.list()]
        same = Evaluation(
            arms=[EvaluationArm(arm_id="zero", model="tiny")],
            metrics=[EVALUATION_METRIC_EXACT_MATCH],
            max_new_tokens=8,
            primary_score="exact_match",
        )
        again = client.learning_curve(job(made["rendering"], 12), same, curve_id="tsl-more", shares=SHARES)
        assert [one.name for one in client.jobs.list()] == before, "it goes on where the other was"
    assert again.words == made["words"]
    assert again.fit is not None
    assert made["fit"] == pytest.approx(
        {
            "atOne": again.fit.at_one,
            "perDoubling": again.fit.per_doubling,
            "lower": again.fit.lower,
            "upper": again.fit.upper,
        }
    )
