"""Deliveries to receivers that are there, away, slow, broken or not to be called; on a real database."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from standardwebhooks import Webhook as Verifier
from tests.work.webhooks.conftest import A_RECEIVER, QUICK, SECRET_PATH, Bench, free_port
from tests.work.webhooks.receiver import Receiver, headers_of, make_certificate, receiving

from luthier.errors import Failure, InvalidArgument, Reason, ResourceExhausted
from luthier.errors.status import failure_to_status
from luthier.storage.disk import Disk
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work.keeping import Keeping
from luthier.work.schema import deliveries
from luthier.work.webhooks import assembly, outbox
from luthier.work.webhooks.signing import secrets_of
from luthier.work.webhooks.targets import Target

State = WebhookDelivery.State
NO_TIME = 1e-6
"""What is over is over for longer when somebody looks."""


async def test_what_arrives_is_signed_and_says_what_ended(bench: Bench, tmp_path: Path) -> None:
    job = FineTuningJob(name="projects/p/fineTuningJobs/a", uid="u1", state=FineTuningJob.STATE_FAILED)
    job.error.CopyFrom(
        failure_to_status(
            Failure(code="RESOURCE_EXHAUSTED", reason=Reason.OUT_OF_MEMORY, message="words of a record")
        )
    )
    with receiving(tmp_path) as receiver:
        await bench.end(receiver.origin + SECRET_PATH, job=job)
        async with bench.sending():
            (delivery,) = await bench.until(State.STATE_DELIVERED)
        (told,) = receiver.received()
    (secret,) = secrets_of(bench.secret_file, receiver.origin, "p")
    event = Verifier(secret).verify(told["body"], headers_of(told))
    assert event["type"] == delivery.event_type == "fine_tuning_job.succeeded"
    assert event["data"] == {
        "name": "projects/p/fineTuningJobs/a",
        "uid": "u1",
        "project": "projects/p",
        "state": "SUCCEEDED",
        "create_time": "1970-01-01T00:00:00Z",
        "reason": "OUT_OF_MEMORY",
    }
    assert "words of a record" not in told["body"]
    assert told["path"] == SECRET_PATH
    assert told["headers"]["webhook-id"] == delivery.delivery_id
    assert told["headers"]["content-type"] == "application/json"
    assert (delivery.num_attempts, delivery.last_status_code, delivery.last_error) == (1, 204, "")
    assert delivery.HasField("end_time")
    assert not delivery.HasField("next_attempt_time")
    assert bench.count("luthier_webhook_attempts_total", result="confirmed") == 1
    assert bench.count("luthier_webhook_deliveries_total", outcome="delivered") == 1


async def test_an_evaluation_is_called_what_it_is(bench: Bench) -> None:
    async with bench.database.transaction() as connection:
        message = Evaluation(name="projects/p/evaluations/e", uid="u1")
        await outbox.record(connection, "u1", message, [Webhook(url="https://a.example/")], "CANCELLED")
    assert [one.event_type for one in await bench.deliveries()] == ["evaluation.cancelled"]


async def test_what_is_rolled_back_tells_nobody(bench: Bench) -> None:
    with suppress(RuntimeError):
        async with bench.database.transaction() as connection:
            job = FineTuningJob(name="projects/p/fineTuningJobs/a", uid="u1")
            await outbox.record(connection, "u1", job, [Webhook(url="https://a.example/")], "SUCCEEDED")
            raise RuntimeError("as if the end could not be stored")
    assert await bench.deliveries() == []


async def test_a_receiver_that_is_away_is_told_when_it_is_back(bench: Bench, tmp_path: Path) -> None:
    receiver = Receiver(folder=tmp_path, port=free_port())
    await bench.end(f"{receiver.origin}/ok")
    async with bench.sending():
        (waits,) = await bench.until(State.STATE_PENDING, attempts=2)
        assert waits.last_error == f"{receiver.origin} cannot be reached: Connection refused"
        assert waits.next_attempt_time.ToDatetime() > waits.last_attempt_time.ToDatetime()
        assert bench.count("luthier_webhook_deliveries_waiting") == 1
        receiver.start()
        try:
            (arrived,) = await bench.until(State.STATE_DELIVERED)
        finally:
            receiver.kill()
    assert arrived.num_attempts >= 3
    assert arrived.delivery_id == waits.delivery_id
    assert arrived.last_error == ""
    assert bench.count("luthier_webhook_attempts_total", result="unreachable") >= 2


@pytest.mark.parametrize(
    ("path", "result", "said"),
    [
        ("/fail", "refused", "answered 500"),
        ("/redirect", "refused", "answered 302: redirects are not followed, name where it leads"),
        ("/slow", "slow", "did not answer within 1 s"),
        ("/trickle", "slow", "did not answer within 1 s"),
        ("/garbage", "misunderstood", ": what it answered is no HTTP/1.1"),
        ("/silent", "misunderstood", ": it ended the connection before it answered"),
    ],
)
async def test_what_is_not_confirmed_is_tried_again(
    bench: Bench, tmp_path: Path, path: str, result: str, said: str
) -> None:
    with receiving(tmp_path) as receiver:
        await bench.end(receiver.origin + path)
        async with bench.sending():
            (waits,) = await bench.until(State.STATE_PENDING, attempts=2)
        told = receiver.received()
    assert waits.last_error in (f"{receiver.origin}{said}", f"{receiver.origin} {said}")
    assert {one["path"] for one in told} == {path}, "no redirect is followed"
    assert len({one["headers"]["webhook-id"] for one in told}) == 1, "the id is the same in every attempt"
    assert len({one["body"] for one in told}) == 1
    assert bench.count("luthier_webhook_attempts_total", result=result) >= 2


async def test_an_answer_behind_an_informational_one_counts(bench: Bench, tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/informed")
        async with bench.sending():
            (arrived,) = await bench.until(State.STATE_DELIVERED)
    assert arrived.last_status_code == 200


async def test_a_receiver_that_is_gone_for_good_is_told_no_more(bench: Bench, tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/gone")
        async with bench.sending():
            (given_up,) = await bench.until(State.STATE_GIVEN_UP)
    assert (given_up.num_attempts, given_up.last_status_code) == (1, 410)
    assert bench.count("luthier_webhook_deliveries_total", outcome="given_up") == 1


async def test_a_receiver_that_asks_for_time_is_given_it(bench: Bench, tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/busy")
        async with bench.sending(replace(QUICK, max_age_seconds=3600.0)):
            (waits,) = await bench.until(State.STATE_PENDING, attempts=1)
            await asyncio.sleep(0.5)
        assert len(receiver.received()) == 1
    pause = waits.next_attempt_time.ToDatetime() - waits.last_attempt_time.ToDatetime()
    assert 1190 < pause.total_seconds() < 1210


async def test_a_delivery_is_given_up_when_it_is_too_old(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.end(f"http://127.0.0.1:{free_port()}{SECRET_PATH}")
    with caplog.at_level(logging.INFO):
        async with bench.sending(replace(QUICK, max_age_seconds=4.0)), asyncio.timeout(30.0):
            (given_up,) = await bench.until(State.STATE_GIVEN_UP)
            # It is said after it is noted, which is seen sooner.
            while "given up after" not in caplog.text:  # noqa: ASYNC110 - nothing tells when
                await asyncio.sleep(0.02)
    assert given_up.num_attempts >= 2
    assert given_up.HasField("end_time")
    assert "s3cret" not in caplog.text, "what a URL asks for may be secret"


async def test_what_is_older_than_it_may_get_is_tried_once(bench: Bench, tmp_path: Path) -> None:
    """A service that was down for days tells all the same."""
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        await asyncio.sleep(0.3)
        async with bench.sending(replace(QUICK, max_age_seconds=0.1)):
            await bench.until(State.STATE_DELIVERED)


async def test_pauses_grow(bench: Bench) -> None:
    await bench.end(f"http://127.0.0.1:{free_port()}/ok")
    async with bench.sending(replace(QUICK, first_delay_seconds=0.1)):
        (waits,) = await bench.until(State.STATE_PENDING, attempts=4)
    pause = waits.next_attempt_time.ToDatetime() - waits.last_attempt_time.ToDatetime()
    assert 0.1 * 3 ** (waits.num_attempts - 1) * 0.79 < pause.total_seconds()


async def test_dead_receivers_stop_nobody(bench: Bench, tmp_path: Path) -> None:
    """Forty jobs wait for one that takes connections and says nothing, before one that is well."""
    with receiving(tmp_path, name="dead") as dead, receiving(tmp_path, name="well") as well:
        for number in range(40):
            await bench.end(f"{dead.origin}/slow", uid=f"dead{number}")
        await bench.end(f"{well.origin}/ok", uid="well")
        async with bench.sending(replace(QUICK, timeout_seconds=5.0)):
            began = time.monotonic()
            await bench.until(State.STATE_DELIVERED, uid="well")
            assert time.monotonic() - began < 4.0, "it waited for an attempt at another one"
        assert len(dead.received()) <= 2, "a few attempts at a time for each receiver"


async def test_many_deliveries_to_one_receiver_are_sent_each_once(bench: Bench, tmp_path: Path) -> None:
    with receiving(tmp_path) as receiver:
        for number in range(30):
            await bench.end(f"{receiver.origin}/ok", uid=f"u{number}")
        async with bench.sending():
            for number in range(30):
                await bench.until(State.STATE_DELIVERED, uid=f"u{number}")
        ids = [one["headers"]["webhook-id"] for one in receiver.received()]
    assert len(ids) == len(set(ids)) == 30


async def test_what_arrived_while_a_lane_chose_is_not_sent_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane looks twice in one consistent state, in which what another lane has meanwhile settled is due still."""
    look = outbox.first_due_of

    async def slowly(*args: Any) -> outbox.Delivery | None:
        found = await look(*args)
        if found is None:
            await asyncio.sleep(0.1)
        return found

    monkeypatch.setattr(outbox, "first_due_of", slowly)
    with receiving(tmp_path) as receiver:
        for number in range(6):
            await bench.end(f"{receiver.origin}/ok", uid=f"u{number}")
        async with bench.sending():
            for number in range(6):
                await bench.until(State.STATE_DELIVERED, uid=f"u{number}")
            await asyncio.sleep(0.5)
        ids = [one["headers"]["webhook-id"] for one in receiver.received()]
    assert len(ids) == len(set(ids)) == 6


async def test_what_is_not_allowed_is_not_called(bench: Bench, tmp_path: Path) -> None:
    """An operator may have changed the list since the job was made."""
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        async with bench.sending(replace(QUICK, addresses=("hooks.example.com",))):
            (waits,) = await bench.until(State.STATE_PENDING, attempts=1)
        assert receiver.received() == []
    assert "is not host:port of hooks.example.com" in waits.last_error
    assert bench.count("luthier_webhook_attempts_total", result="not_allowed") >= 1


@pytest.mark.parametrize("spoilt", ["mode", "bytes", "short", "link", "gone"])
async def test_without_its_secret_nothing_is_sent(bench: Bench, tmp_path: Path, spoilt: str) -> None:
    well = bench.secret_file.read_bytes()
    match spoilt:
        case "mode":
            bench.secret_file.chmod(0o644)
        case "bytes":
            bench.secret_file.write_bytes(b"\xff" * 40)
        case "short":
            bench.secret_file.write_text("hunter2")
        case "link":
            bench.secret_file.rename(tmp_path / "aside")
            bench.secret_file.symlink_to(tmp_path / "aside")
        case "gone":
            bench.secret_file.unlink()
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        async with bench.sending():
            (waits,) = await bench.until(State.STATE_PENDING, attempts=2)
            assert waits.last_error == "the service has no secret to sign it with"
            assert receiver.received() == []
            bench.secret_file.unlink(missing_ok=True)
            bench.secret_file.touch(mode=0o600)
            bench.secret_file.write_bytes(well)
            await bench.until(State.STATE_DELIVERED)
    assert bench.count("luthier_webhook_attempts_total", result="not_signed") >= 1


async def test_a_receiver_with_a_certificate_of_the_operators_is_believed(
    bench: Bench, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path)
    with receiving(tmp_path, is_secure=True) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        async with bench.sending():
            (waits,) = await bench.until(State.STATE_PENDING, attempts=1)
            assert "its certificate is not believed: self-signed certificate" in waits.last_error
            assert receiver.received() == []
        async with bench.sending(replace(QUICK, ca_file=certificate)):
            await bench.until(State.STATE_DELIVERED)


async def test_a_certificate_of_another_host_is_not_believed(bench: Bench, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "127.0.0.2")
    with receiving(tmp_path, is_secure=True) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        async with bench.sending(replace(QUICK, ca_file=certificate)):
            (waits,) = await bench.until(State.STATE_PENDING, attempts=1)
        assert receiver.received() == []
    assert "its certificate is not believed: IP address mismatch" in waits.last_error


async def test_a_file_without_certificates_is_refused(bench: Bench, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.pem").write_text("")
    with pytest.raises(InvalidArgument, match="LUTHIER_WEBHOOKS_CA_FILE must name a file with certificates"):
        async with bench.sending(replace(QUICK, ca_file=empty)):
            pass


async def test_proxies_of_the_environment_are_not_asked(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with receiving(tmp_path) as receiver:
        await bench.end(f"{receiver.origin}/ok")
        async with bench.sending():
            await bench.until(State.STATE_DELIVERED)


async def test_what_is_over_for_as_long_as_is_set_is_forgotten(bench: Bench) -> None:
    await bench.end("https://a.example/", uid="over")
    await bench.end("https://a.example/", uid="waits")
    async with bench.database.transaction() as connection:
        over = await outbox.next_due(connection, A_RECEIVER, [])
        assert over is not None
        await outbox.settle(connection, over, State.STATE_DELIVERED)
    async with bench.sending(replace(QUICK, addresses=())) as sender:
        for kept_for in (0.0, 60.0):
            await sender.forget_ended(kept_for)
            assert len(await bench.deliveries("waits")) == len(await bench.deliveries("over")) == 1
        await sender.forget_ended(NO_TIME)
    assert (len(await bench.deliveries("waits")), len(await bench.deliveries("over"))) == (1, 0)


async def test_a_service_keeps_deliveries_as_long_as_finished_tasks(bench: Bench) -> None:
    await bench.end("https://a.example/", uid="over")
    async with bench.database.transaction() as connection:
        over = await outbox.next_due(connection, A_RECEIVER, [])
        assert over is not None
        await outbox.settle(connection, over, State.STATE_DELIVERED)
        hours = deliveries.c.ended_at_us - round(2 * 3600 * 1e6)
        await connection.execute(update(deliveries).values(ended_at_us=hours))
    async with bench.sending(replace(QUICK, addresses=())) as sender:
        for seconds, left in ((0.0, 1), (3 * 3600.0, 1), (3600.0, 0)):
            for chore in assembly.chores(sender, Keeping(task_keep_seconds=seconds)):
                await chore.work()
            assert len(await bench.deliveries("over")) == left


async def test_what_is_over_leaves_a_full_disk_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what fills it could not go."""
    await bench.database.reserve()
    await bench.end("https://a.example/")
    async with bench.database.transaction() as connection:
        over = await outbox.next_due(connection, A_RECEIVER, [])
        assert over is not None
        await outbox.settle(connection, over, State.STATE_GIVEN_UP)
    monkeypatch.setattr(Disk, "free_bytes", lambda _: 0)
    with pytest.raises(ResourceExhausted):
        await bench.end("https://a.example/", uid="more")
    async with bench.sending(replace(QUICK, addresses=())) as sender:
        await sender.forget_ended(NO_TIME)
    assert await bench.deliveries() == []


async def test_a_url_that_no_version_takes_any_more_does_not_fail_the_end(bench: Bench) -> None:
    await bench.end("gopher://a.example/")
    async with bench.sending():
        (waits,) = await bench.until(State.STATE_PENDING, attempts=1)
    assert waits.last_error.startswith("the URL must be https://host")


async def test_the_body_is_short_json(bench: Bench) -> None:
    await bench.end("https://a.example/")
    async with bench.database.reading() as connection:
        found = await outbox.next_due(connection, A_RECEIVER, [])
    assert found is not None
    assert len(found.body) < 1024
    assert set(json.loads(found.body)) == {"type", "timestamp", "data"}
    assert "a.example" not in repr(found)


async def test_what_nobody_thought_of_is_an_attempt_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else it would be sent every minute for ever."""

    async def broken(_addresses: object, target: Target, *_: object, **__: object) -> None:
        raise RuntimeError(f"no such thing as {target.path}")

    monkeypatch.setattr("luthier.work.webhooks.sender.post", broken)
    await bench.end(f"http://127.0.0.1:1{SECRET_PATH}")
    async with bench.sending(replace(QUICK, max_age_seconds=4.0)):
        (given_up,) = await bench.until(State.STATE_GIVEN_UP)
    assert given_up.num_attempts >= 2
    assert given_up.last_error == "the service failed to send it"
    assert bench.count("luthier_webhook_attempts_total", result="failed") >= 2
    assert "a webhook failed by RuntimeError at " in caplog.text
    assert "s3cret" not in caplog.text, "what a URL asks for may be secret"
