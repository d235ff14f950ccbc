"""Jobs tell webhooks of their end, whatever happens to the service meanwhile: a real process, killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from standardwebhooks import Webhook as Verifier
from tests.stores import database_file, environment, service_file
from tests.training.conftest import Bench, adapter_files
from tests.work.webhooks.ends import check_end_is_one
from tests.work.webhooks.receiver import Receiver, headers_of, receiving

from luthier.client import Client, ConfigArguments
from luthier.client.cli import main
from luthier.errors import Failure, InvalidArgument, Reason
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.webhook_pb2 import Webhook, WebhookDelivery
from luthier.work.tasks import Outcome
from luthier.work.webhooks.signing import SECRET_FILE, secrets_of
from luthier.worker.v1 import task_pb2

State = WebhookDelivery.State


async def test_an_end_and_what_is_to_be_told_of_it_are_one(bench: Bench) -> None:
    urls = ["http://127.0.0.1:1/a", "https://127.0.0.1:2/b"]
    created = await bench.create("j", webhooks=[Webhook(url=url) for url in urls])
    family = bench.jobs.family
    assert await family.deliveries(created.uid, 0, 10) == []
    assert [webhook.url for webhook in created.webhooks] == urls
    await bench.cancel(created.name)
    found = await family.deliveries(created.uid, 0, 10)
    assert [(number, one.url) for number, one in found] == list(enumerate(urls, start=1))
    assert {(one.event_type, one.state) for _, one in found} == {
        ("fine_tuning_job.cancelled", State.STATE_PENDING)
    }
    assert [number for number, _ in await family.deliveries(created.uid, 1, 10)] == [2]


@pytest.mark.parametrize(
    ("how", "state"),
    [("succeeded", "SUCCEEDED"), ("failed", "FAILED"), ("cancelled", "CANCELLED"), ("lost", "FAILED")],
)
async def test_an_end_that_cannot_be_stored_is_told_to_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, state: str
) -> None:
    created = await bench.create("j", webhooks=[Webhook(url="http://127.0.0.1:1/a")])
    task, _ = await bench.claim()
    monkeypatch.setattr(bench.queue, "_attempts", replace(bench.queue._attempts, max_losses=1))
    lost = Failure(code="UNAVAILABLE", reason=Reason.WORKER_LOST, message="gone")
    files = await adapter_files(bench)
    outcomes = {
        "succeeded": Outcome(result=task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1))),
        "failed": Outcome(failure=Failure(code="INTERNAL", reason="INTERNAL", message="")),
        "cancelled": Outcome(cancelled=True),
        "lost": Outcome(failure=lost),
    }
    if how == "cancelled":
        await bench.cancel(created.name)
    told = await check_end_is_one(
        bench.jobs.family,
        created.name,
        lambda: bench.queue.finish(task.task_id, task.epoch, outcomes[how]),
        FineTuningJob.State.Value(f"STATE_{state}"),
        monkeypatch,
    )
    assert told.event_type == f"fine_tuning_job.{state.lower()}"


async def test_a_job_without_webhooks_tells_nobody(bench: Bench) -> None:
    created = await bench.create("j")
    await bench.cancel(created.name)
    assert await bench.jobs.family.deliveries(created.uid, 0, 10) == []


async def test_a_job_whose_webhook_may_not_be_called_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("j", webhooks=[Webhook(url="https://elsewhere.example/")])
    (violation,) = caught.value.violations
    assert violation.field == "fine_tuning_job.webhooks[0].url"
    assert violation.reason == Reason.ADDRESS_NOT_ALLOWED


@pytest.mark.parametrize(
    ("urls", "field", "said"),
    [
        (["http://127.0.0.1/"] * 9, "fine_tuning_job.webhooks", "must hold at most 8 webhooks, got 9"),
        ([""], "fine_tuning_job.webhooks[0].url", "must be at most 2048 bytes, got 0"),
        (
            ["http://127.0.0.1/" + "x" * 2048],
            "fine_tuning_job.webhooks[0].url",
            "must be at most 2048 bytes, got 2065",
        ),
    ],
)
async def test_webhooks_have_limits(bench: Bench, urls: list[str], field: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("j", webhooks=[Webhook(url=url) for url in urls])
    assert [(one.field, one.description) for one in caught.value.violations] == [(field, said)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Service:
    """The Training service as a process on a home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
        settings = {
            "LUTHIER_HOME": str(self.home),
            "LUTHIER_TRAINING_ADDRESS": self.address,
            "LUTHIER_TRAINING_METRICS_ADDRESS": "127.0.0.1:0",
            "LUTHIER_WEBHOOKS_ADDRESSES": "127.0.0.1",
            "LUTHIER_WEBHOOKS_FIRST_DELAY_SECONDS": "0.2",
            **environment(self.home),
        }
        command = [sys.executable, "-m", "luthier.training"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, env=clean | settings, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        with grpc.insecure_channel(self.address, [("grpc.max_reconnect_backoff_ms", 100)]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    return
                except grpc.RpcError:
                    time.sleep(0.05)
        pytest.fail(f"the service does not serve:\n{self.log.read_text()}")

    @property
    def log(self) -> Path:
        return self.home / "service.log"

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    @contextmanager
    def client(self) -> Iterator[Client]:
        with Client(ConfigArguments(home=self.home, training_address=self.address)) as client:
            yield client


async def queued(bench: Bench, home: Path, url: str) -> Service:
    """A service that has a queued job, which tells a URL of its end."""
    await bench.create("j", webhooks=[Webhook(url=url)])
    await bench.database.close()
    moved_home(bench.folder, home)
    return Service(home)


def moved_home(folder: Path, home: Path) -> None:
    """Put the bench's database where a service finds it."""
    (home / "training").mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    made, found = database_file(folder / "training"), service_file(home, "training")
    for suffix in ("", "-wal", "-shm"):
        path = made.with_name(made.name + suffix)
        if path.exists():
            path.rename(found.with_name(found.name + suffix))


def delivered(service: Service) -> WebhookDelivery:
    """The one delivery of the job, once it has arrived."""
    deadline = time.monotonic() + 30
    with service.client() as client:
        while time.monotonic() < deadline:
            (found,) = client.jobs.deliveries("j")
            if found.state == State.STATE_DELIVERED:
                return found
            time.sleep(0.05)
    pytest.fail(f"it did not arrive: {found}\n{service.log.read_text()}")


async def test_a_service_that_is_killed_after_an_end_tells_of_it(bench: Bench, tmp_path: Path) -> None:
    """Once before anybody listens, once while the receiver thinks about it: the id stays, and it arrives."""
    receiver = Receiver(folder=tmp_path, port=free_port())
    service = await queued(bench, tmp_path / "home", f"{receiver.origin}/slow?key=s3cret")
    service.start()
    try:
        with service.client() as client:
            client.jobs.cancel("j")
        service.kill()

        receiver.start()
        service.start()
        receiver.await_received(1)
        service.kill()
        receiver.kill()

        # What it is told a second time it takes at once.
        with receiving(tmp_path, port=receiver.port, name="second", always="/ok") as second:
            service.start()
            found = delivered(service)
            told = [*receiver.received(), *second.received()]
        assert len(told) >= 2
        assert {one["headers"]["webhook-id"] for one in told} == {found.delivery_id}
        (secret,) = secrets_of(service.home / SECRET_FILE, receiver.origin, "default")
        events = [Verifier(secret).verify(one["body"], headers_of(one)) for one in told]
        assert all(event == events[0] for event in events)
        assert events[0]["type"] == "fine_tuning_job.cancelled"

        runner = CliRunner()
        where = ["--home", str(service.home), "--training-address", service.address]
        shown = runner.invoke(main, [*where, "jobs", "deliveries", "j"])
        assert shown.exit_code == 0, shown.output
        assert "fine_tuning_job.cancelled" in shown.output
        assert "DELIVERED" in shown.output
        log = service.log.read_text()
        assert "s3cret" not in log, "what a URL asks for may be secret"
        assert secret not in log
        assert (service.home / SECRET_FILE).read_text().strip() not in log
    finally:
        service.kill()
        receiver.kill()
