"""What Ray says of an end, in reasons that a program can switch on; and a checkpoint that is not waited for."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("ray", reason="needs the extra ray")

from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from luthier.errors import DataLoss, LuthierError, Unavailable
from luthier.training.executors.ray import fit as fitting
from luthier.training.executors.ray.driver import _unless_stored
from luthier.training.executors.ray.fit import _lost, _Run
from luthier.training.executors.ray.orders import Fleet
from luthier.training.executors.ray.post import Letter
from luthier.training.executors.ray.rank import FarDesk
from luthier.work.context import TaskContext
from luthier.worker.v1 import task_pb2


def group_error(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("two ranks failed", failures)


def test_a_rank_that_ray_finds_dead_is_named_before_one_that_complains() -> None:
    dead = WorkerHealthCheckFailedError("a check failed", ActorDiedError())
    found = _lost(group_error({0: RuntimeError("connection closed by peer"), 1: dead}), 2)
    assert found is not None
    assert (found.reason, found.code, found.metadata) == ("RANK_LOST", "UNAVAILABLE", {"rank": "1"})
    assert found.message.startswith("rank 1 of 2 is lost: ")


def test_complaints_alone_name_nobody() -> None:
    assert _lost(group_error({0: RuntimeError("connection closed by peer")}), 2) is None


def test_a_rank_that_ray_ends_for_want_of_memory_fails_the_job() -> None:
    found = _lost(group_error({0: WorkerHealthCheckFailedError("x", OutOfMemoryError("memory is short"))}), 2)
    assert found is not None
    assert (found.reason, found.code) == ("OUT_OF_MEMORY", "RESOURCE_EXHAUSTED")


def test_ranks_that_find_no_room_are_too_few() -> None:
    found = _lost(ControllerError(WorkerGroupStartupTimeoutError(4)), 4)
    assert found is not None
    assert (found.reason, found.code) == ("TOO_FEW_RANKS", "UNAVAILABLE")
    assert "no room for 4 ranks" in found.message


def test_ranks_that_cannot_be_started_are_lost() -> None:
    found = _lost(ControllerError(RuntimeError("a trace\nno such module")), 2)
    assert found is not None
    assert (found.reason, found.message) == ("RANK_LOST", "the ranks could not be started: no such module")


class Storing:
    """A context of which a checkpoint is being stored."""

    def __init__(self) -> None:
        self.stored: Future[list[task_pb2.BlobFile]] = Future()
        self.is_wanted = True

    def heed(self) -> None:
        if not self.is_wanted:
            raise Unavailable("not wanted")

    def checkpoint_stored(self, check: Any) -> list[task_pb2.BlobFile]:
        while not self.stored.done():
            check()
        return self.stored.result()


def test_a_checkpoint_that_is_not_stored_yet_is_none_and_holds_up_nobody() -> None:
    storing = Storing()
    ready = _unless_stored(cast(TaskContext, storing))
    assert ready() is None
    storing.is_wanted = False
    with pytest.raises(Unavailable, match="not wanted"):
        ready()
    storing.stored.set_result([task_pb2.BlobFile(path="adapter")])
    assert [file.path for file in ready() or ()] == ["adapter"]


def test_a_rank_that_goes_after_its_work_is_done_loses_nothing() -> None:
    said: list[Any] = []
    run = SimpleNamespace(_line=SimpleNamespace(tell=lambda *call: said.append(call)), _sentries={})
    fit: Future[None] = Future()
    fit.set_exception(group_error({1: WorkerHealthCheckFailedError("a check failed", ActorDiedError())}))
    _Run._leave(cast(_Run, run), fit)
    [(name, (text, severity))] = said
    assert (name, severity) == ("log", "WARNING")
    assert text.startswith("the ranks have not ended in order: ")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataLoss("other bytes have come"), "DATA_LOSS", "other bytes have come"),
        (OSError("no such host"), "UNAVAILABLE", "files of rank 1 have not come to its driver: no such host"),
    ],
)
def test_a_file_that_does_not_come_ends_the_attempt_whoever_waits_for_it(
    tmp_path: Path, error: Exception, code: str, words: str
) -> None:
    """A rank that is not the first never asks what became of its files."""
    told: list[Letter] = []

    def tell(name: str, arguments: tuple[Any, ...]) -> None:
        told.append(Letter(rank=1, name=name, arguments=arguments))

    def send(paths: list[Path], folder: str) -> None:
        raise error

    desk = FarDesk.__new__(FarDesk)
    desk._wire = cast(Any, SimpleNamespace(rank=1, tell=tell))
    desk._files = cast(Any, SimpleNamespace(send=send))
    desk._place = tmp_path
    with pytest.raises(type(error)):
        desk._send([tmp_path / "part"], "step-3")
    [letter] = told
    run = SimpleNamespace(_given=SimpleNamespace(order=SimpleNamespace(scratch=tmp_path)))
    with ThreadPoolExecutor(1) as server, pytest.raises(LuthierError, match=words) as raised:
        _Run._take(cast(_Run, run), letter, server)
    assert raised.value.code == code


def test_ray_tries_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is the attempt, of which the queue makes another."""
    given: list[dict[str, Any]] = []
    trainer = SimpleNamespace(fit=lambda: None)

    def made(_: Any, **options: Any) -> Any:
        given.append(options)
        return trainer

    monkeypatch.setattr(fitting, "_Trainer", made)
    monkeypatch.setattr(fitting, "put", lambda _: None)
    run = SimpleNamespace(
        _given=SimpleNamespace(
            fleet=Fleet(address="auto", num_ranks=2), order=SimpleNamespace(scratch=tmp_path)
        ),
        _nodes=[SimpleNamespace(node_id="n")],
        _num_ranks=2,
        _post=None,
        _attempt="a",
    )
    _Run._fit(cast(_Run, run), cast(Any, None))
    [options] = given
    again = options["run_config"].failure_config
    assert (again.max_failures, again.max_preemption_failures, again.controller_failure_limit) == (0, 0, 0)
    assert options["scaling_config"].num_workers == 2, "a number, no range that Ray may choose from again"
