"""`luthierd up` as people run it: a disk that fills and a supervisor that is killed cost no step."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.e2e.conftest import WAIT, Cluster, job, prepare
from tests.e2e.test_kill import assert_same_run, attempts, undisturbed, when_step
from tests.small_disk import fill, mounted

from luthier.errors import Reason, ResourceExhausted
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.slow]
LUTHIERD = str(Path(sys.executable).with_name("luthierd"))
STEPS, INTERVAL = 80, 20
MIB = 1 << 20
DISK_MIB = 128
ORPHAN_SECONDS = 30
"""A worker that is told to end has 20 s for its tasks."""
FLOOR_BYTES = 48 * MIB
"""Below what keeps room for cancelling, so that a database may run out of room, too."""
LEFT_BYTES = FLOOR_BYTES // 32
"""Half of what is the databases' alone: no checkpoint is stored any more, and what a slow machine tells of the steps up
to the next one, each by itself, has its place."""


class Up(Cluster):
    """A home on a small disk, and one `luthierd up` on it at a time."""

    def __init__(self, disk: Path) -> None:
        super().__init__(disk / "home")
        self.disk = disk
        self.rendering = ""
        self._up: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        floors = {f"LUTHIER_{name}_MIN_FREE_BYTES": str(FLOOR_BYTES) for name in ("DATA", "TRAINING")}
        return super().environment() | floors

    def begin(self) -> None:
        """Run `luthierd up`, and return when it says that it is ready."""
        said = self.home / "up.log"
        said.unlink(missing_ok=True)
        with said.open("wb") as log:
            self._up = subprocess.Popen([LUTHIERD, "up"], env=self.environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + WAIT
        while "ready in" not in said.read_text():
            assert self._up.poll() is None, f"luthierd ended:\n{said.read_text()}"
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)

    def kill_all(self) -> set[int]:
        """kill -9 of the supervisor alone; returns the processes that it had."""
        assert self._up is not None
        children = self.processes() - {self._up.pid}
        self._up.send_signal(signal.SIGKILL)
        self._up.wait()
        return children

    def finish(self) -> None:
        """SIGTERM, as Ctrl-C is; nothing of the home runs afterwards."""
        assert self._up is not None
        self._up.terminate()
        assert self._up.wait(60) == 0
        assert self.processes() == set(), self.commands()

    def wait_gone(self, orphans: set[int]) -> None:
        """Return when none of them runs, as each must within the time that a worker has to give its tasks back."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while orphans & self.processes():
            assert time.monotonic() < deadline, self.commands()
            time.sleep(0.1)

    def commands(self) -> dict[int, str]:
        """What runs with this home, as it was called."""
        found = {}
        for pid in self.processes():
            with suppress(OSError):
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
                status = (Path("/proc") / str(pid) / "status").read_text()
                parent = status.partition("PPid:")[2].split()[0]
                found[pid] = f"{b' '.join(words).decode()} of {parent}"
        return found

    def processes(self) -> set[int]:
        """Whatever runs with this home."""
        setting = f"LUTHIER_HOME={self.home}".encode()
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if setting in (path / "environ").read_bytes().split(b"\0"):
                    found.add(int(path.name))
        return found


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with mounted(tmp_path_factory.mktemp("up") / "disk", DISK_MIB) as disk:
        made = Up(disk)
        made.begin()
        with made.client() as client:
            made.rendering = prepare(made, client)
        yield made
        made.finish()
        assert made.faults() == []


def losses(events: list[Event]) -> list[str]:
    changes = [event.attempt_change for event in events]
    return [change.reason for change in changes if change.kind == AttemptChange.KIND_LOST]


def test_a_job_whose_disk_fills_while_it_trains_goes_on_when_there_is_room(up: Up) -> None:
    with up.client() as client:
        long = job(up.rendering, STEPS, checkpoint_interval_steps=INTERVAL)
        client.jobs.create(long, job_id="full")
        client.jobs.create(long, job_id="behind")
        fillers: list[Path] = []
        when_step(client, "full", INTERVAL + 5, lambda: fillers.append(fill(up.disk, LEFT_BYTES)))
        lost = next(event for event in client.jobs.watch("full") if losses([event]))
        assert lost.attempt_change.reason == Reason.DISK_FULL
        assert client.jobs.get("full").state == FineTuningJob.STATE_QUEUED

        for refused in (
            lambda: client.jobs.create(long, job_id="late"),
            lambda: client.datasets.upload(up.home / "train.jsonl"),
        ):
            with pytest.raises(ResourceExhausted, match="must stay free") as caught:
                refused()
            assert caught.value.reason == Reason.DISK_FULL
        assert client.jobs.cancel("behind").state == FineTuningJob.STATE_CANCELLED
        client.jobs.delete("behind")
        assert client.jobs.get("full").num_attempts == 1, "nobody takes it up while there is no room"

        fillers[0].unlink()
        done = client.jobs.wait("full", timeout_seconds=WAIT)
        assert done.num_attempts == 2
        # Not before: the same bytes are stored once, and need no room again.
        assert_same_run(client, undisturbed(client, up.rendering), "full")
        events = list(client.jobs.watch("full"))
    assert attempts(events) == [
        AttemptChange.KIND_STARTED,
        AttemptChange.KIND_LOST,
        AttemptChange.KIND_STARTED,
        AttemptChange.KIND_SUCCEEDED,
    ]
    first, again = (
        [event.step for event in events if event.HasField("metrics") and event.attempt == attempt]
        for attempt in (1, 2)
    )
    kept = [event.step for event in events if event.HasField("checkpoint") and event.attempt == 1]
    assert min(again) == max(kept) + 1, "it goes on from the last checkpoint that had room"
    assert max(first) >= min(again)


def test_a_supervisor_killed_and_started_at_once_loses_nothing_and_leaves_no_orphan(up: Up) -> None:
    with up.client() as client:
        alone = undisturbed(client, up.rendering)
        client.jobs.create(job(up.rendering, STEPS, checkpoint_interval_steps=INTERVAL), job_id="killed-up")
        watched: list[Event] = []
        watcher = threading.Thread(target=lambda: watched.extend(client.jobs.watch("killed-up")))
        watcher.start()
        orphans: set[int] = set()
        when_step(client, "killed-up", INTERVAL + 5, lambda: orphans.update(up.kill_all()))
        assert len(orphans) >= 6, "three services, three workers"
        up.begin()
        up.wait_gone(orphans)
        # Again, while its workers start.
        orphans = up.kill_all()
        up.begin()
        up.wait_gone(orphans)
        done = client.jobs.wait("killed-up", timeout_seconds=WAIT)
        watcher.join(WAIT)

        assert_same_run(client, alone, "killed-up")
        assert done.num_attempts <= 3
        assert attempts(watched)[-1] == AttemptChange.KIND_SUCCEEDED
        # One watch over all: no event missed, none twice.
        assert [event.sequence for event in watched] == list(range(1, len(watched) + 1))
