"""A judge over real processes: an endpoint that fails half of the time, and a worker that is killed while it asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.conftest import JUDGE_KEY, WAIT, Shared, job
from tests.work.judge_stub import Stub, judge_stub

from luthier.client import Client
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.judge_pb2 import Judge, JudgeEndpoint, PairwiseJudging
from luthier.v1.verdict_pb2 import EvaluationVerdict

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("checked_in_the_end")]
RECORDS = 12
ASKED = 2 * RECORDS
"""Both orders of one pair of arms for each record."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    with judge_stub() as running:
        yield running


def judged(client: Client, version: str, tuned: str, stub: Stub, model: str, name: str) -> None:
    """Ask a base and a tuned arm, and have an endpoint's model prefer one of their answers to each record."""
    endpoint = JudgeEndpoint(url=stub.url, model=model, key="JUDGE_KEY", timeout_seconds=30, max_calls=500)
    judge = Judge(
        judge_id="longer",
        criteria="the longer",
        endpoint=endpoint,
        max_new_tokens=64,
        pairwise=PairwiseJudging(),
    )
    wanted = Evaluation(
        dataset_version=version,
        arms=[
            EvaluationArm(arm_id="zero", model="tiny"),
            EvaluationArm(arm_id="tuned", model=tuned),
        ],
        judges=[judge],
        primary_score="judge.longer",
        max_new_tokens=8,
    )
    client.evaluations.create(wanted, evaluation_id=name)


def environments_below(pid: int) -> list[bytes]:
    """The environments of the processes that a process has started."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in thread.read_text().split():
            found += [Path(f"/proc/{child}/environ").read_bytes(), *environments_below(int(child))]
    return found


def check(client: Client, done: Evaluation) -> None:
    """Everything is judged once in each order, and the score is what the answers are."""
    assert done.state == Evaluation.STATE_SUCCEEDED, done.error
    (result,) = done.judge_results
    assert (result.num_asked, result.num_errors) == (ASKED, 0)
    rows = list(client.evaluations.predictions(done.name))
    lengths = [[len(answer.text) for answer in row.answers] for row in rows]
    (pair,) = result.pairs
    assert (pair.arm_id, pair.rival_arm_id) == ("tuned", "zero")
    assert pair.num_wins == sum(tuned > zero for zero, tuned in lengths)
    assert pair.num_ties == sum(tuned == zero for zero, tuned in lengths)
    (compared,) = (one for one in done.comparisons if one.score == "judge.longer")
    assert compared.count == RECORDS
    assert compared.difference == pytest.approx((pair.num_wins - pair.num_losses) / RECORDS)
    assert done.verdict.score == "judge.longer"
    assert done.verdict.outcome != EvaluationVerdict.OUTCOME_UNSPECIFIED
    assert sum(len(row.judgements) for row in rows) == ASKED


def test_a_judge_that_fails_half_of_the_time_judges_all_though_the_worker_is_killed(
    whole: Shared, stub: Stub
) -> None:
    cluster = whole.cluster
    with cluster.client() as client:
        rendering = client.renderings.get(whole.rendering)
        tuned = tuned_model(client, whole.rendering)
        judged(client, rendering.dataset_version, tuned, stub, "longer-half", "judged-through-failures")
        done = client.evaluations.wait("judged-through-failures", timeout_seconds=WAIT)
        check(client, done)
        seen = stub.seen()
        assert len(seen) == ASKED + done.judge_results[0].num_repeated_calls
        assert done.judge_results[0].num_repeated_calls >= ASKED / 3, "about every second call failed"
        assert {one["authorization"] for one in seen} == {f"Bearer {JUDGE_KEY}"}
        children = environments_below(cluster.pid("evaluation-worker"))
        assert children, "the model's process is there"
        assert not any(JUDGE_KEY.encode() in one for one in children)

        judged(client, rendering.dataset_version, tuned, stub, "slow-half", "judged-through-a-kill")
        deadline = time.monotonic() + WAIT
        while len(stub.seen()) < len(seen) + ASKED / 2:
            assert time.monotonic() < deadline, "the judge is not asked"
            time.sleep(0.05)
        cluster.kill("evaluation-worker")
        cluster.start("evaluation-worker")
        again = client.evaluations.wait("judged-through-a-kill", timeout_seconds=WAIT)
        (result,) = again.judge_results
        assert again.state == Evaluation.STATE_SUCCEEDED, again.error
        assert (result.num_asked, result.num_errors) == (ASKED, 0)
        assert result.pairs[0].num_ties == RECORDS, "it says so of each"
        calls = len(stub.seen()) - len(seen)
        assert ASKED < calls <= result.num_calls <= 500, "calls are written down before they are made"
        for kept in cluster.home.rglob("*.log"):
            assert JUDGE_KEY not in kept.read_text(errors="replace")


def tuned_model(client: Client, rendering: str) -> str:
    """A model that a job has tuned by two steps."""
    client.jobs.create(job(rendering, 2), job_id="for-the-judge")
    return client.jobs.wait("for-the-judge", timeout_seconds=WAIT).tuned_model
