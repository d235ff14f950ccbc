"""Evaluations tell webhooks of their end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.test_service import ASKED
from tests.work.webhooks.ends import check_end_is_one

from luthier.errors import Failure, InvalidArgument, Reason
from luthier.v1.evaluation_pb2 import ArmResult, Evaluation, Prediction
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work.row_file import write_rows
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

URL = "http://127.0.0.1:1/told"


async def test_an_evaluation_that_fails_is_told_with_its_reason(bench: Bench) -> None:
    made = await bench.create(webhooks=[Webhook(url=URL)])
    family = bench.service.family
    assert await family.deliveries(made.uid, 0, 10) == []
    task, _ = await bench.claim()
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="row 3: no JSON")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    ((number, told),) = await family.deliveries(made.uid, 0, 10)
    assert (number, told.url, told.event_type) == (1, URL, "evaluation.failed")
    assert told.state == WebhookDelivery.STATE_PENDING


@pytest.mark.parametrize(
    ("how", "state"),
    [("succeeded", "SUCCEEDED"), ("failed", "FAILED"), ("cancelled", "CANCELLED"), ("lost", "FAILED")],
)
async def test_an_end_that_cannot_be_stored_is_told_to_nobody(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, state: str
) -> None:
    made = await bench.create(webhooks=[Webhook(url=URL)])
    task, _ = await bench.claim()
    monkeypatch.setattr(bench.queue, "_attempts", replace(bench.queue._attempts, max_losses=1))
    path = tmp_path / "predictions"
    write_rows(path, iter([Prediction().SerializeToString()]))
    blob = await bench.blobs.put_bytes(path.read_bytes())
    result = task_pb2.EvaluateResult(
        arm_results=[ArmResult(arm_id=arm.arm_id, **ASKED) for arm in made.arms],
        num_records=1,
        predictions=task_pb2.BlobFile(path="predictions", sha256=blob.digest),
    )
    outcomes = {
        "succeeded": Outcome(result=task_pb2.TaskResult(evaluate=result)),
        "failed": Outcome(failure=Failure(code="INTERNAL", reason="INTERNAL", message="")),
        "cancelled": Outcome(cancelled=True),
        "lost": Outcome(failure=Failure(code="UNAVAILABLE", reason=Reason.WORKER_LOST, message="gone")),
    }
    if how == "cancelled":
        await bench.cancel(made.name)
    told = await check_end_is_one(
        bench.service.family,
        made.name,
        lambda: bench.queue.finish(task.task_id, task.epoch, outcomes[how]),
        Evaluation.State.Value(f"STATE_{state}"),
        monkeypatch,
    )
    assert told.event_type == f"evaluation.{state.lower()}"


async def test_an_evaluation_whose_webhook_may_not_be_called_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(webhooks=[Webhook(url=URL), Webhook(url="https://elsewhere.example/")])
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("evaluation.webhooks[1].url", Reason.ADDRESS_NOT_ALLOWED)
