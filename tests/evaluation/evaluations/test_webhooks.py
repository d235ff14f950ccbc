"""Evaluations tell webhooks of their end."""

from __future__ import annotations

import pytest
from tests.evaluation.evaluations.conftest import Bench

from luthier.errors import Failure, InvalidArgument, Reason
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work.tasks import Outcome

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


async def test_an_evaluation_whose_webhook_may_not_be_called_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(webhooks=[Webhook(url=URL), Webhook(url="https://elsewhere.example/")])
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == ("evaluation.webhooks[1].url", Reason.ADDRESS_NOT_ALLOWED)
