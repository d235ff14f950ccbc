"""What ranks do on a GPU, on one that is made up: what is computed, and what is waited for, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from luthier.errors import Unavailable
from luthier.training.recipes.process_group import Replicas


class Gpu:
    """A stream to which work is given, and which ends it where somebody waits: unless it hangs or fails there."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen
        self.given: list[str] = []
        self.hangs: set[str] = set()
        self.fails: set[str] = set()
        self.go_on = threading.Event()

    def give(self, work: str) -> None:
        self.given.append(work)

    def await_to(self, count: int) -> None:
        for work in self.given[:count]:
            if work in self.hangs:
                assert self.go_on.wait(30.0)
            if work in self.fails:
                raise RuntimeError(f"{work} failed")
            if work not in self.seen:
                self.seen.append(work)


class Meetings:
    """Notes meetings among what the GPU ended."""

    def __init__(self, seen: list[str]) -> None:
        self.seen = seen
        self.entered = self.left = 0

    def enter(self, num_bytes: int) -> None:
        self.entered += 1
        self.seen.append(f"enter {num_bytes}")

    def leave(self) -> None:
        self.left += 1
        self.seen.append("leave")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    made = Gpu([])

    class Event:
        def record(self) -> None:
            self.count = len(made.given)

        def synchronize(self) -> None:
            made.await_to(self.count)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: made.await_to(len(made.given)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    yield made
    made.go_on.set()


def begin(replicas: Replicas, gpu: Gpu) -> None:
    """A pass of a divided model: computing, an exchange that is not awaited, computing."""
    gpu.give("forward")
    with replicas.exchange(7, is_awaited=False):
        gpu.give("gathered")
    gpu.give("backward")


def end(replicas: Replicas, gpu: Gpu) -> None:
    with replicas.exchange(9):
        gpu.give("summed")


def test_what_was_begun_is_awaited_as_a_meeting_and_computing_is_not(gpu: Gpu) -> None:
    replicas = Replicas(torch.device("cuda"), Meetings(gpu.seen))
    begin(replicas, gpu)
    assert gpu.seen == ["enter 7", "leave"], "nothing is awaited"
    end(replicas, gpu)
    assert gpu.seen[2:] == [
        "forward",
        *("enter 7", "gathered", "leave"),
        "backward",
        *("enter 9", "summed", "leave"),
    ]


def test_each_is_awaited_once(gpu: Gpu) -> None:
    meetings = Meetings(gpu.seen)
    replicas = Replicas(torch.device("cuda"), meetings)
    begin(replicas, gpu)
    end(replicas, gpu)
    end(replicas, gpu)
    assert meetings.entered == meetings.left == 4


@pytest.mark.parametrize(
    ("work", "is_meeting"), [("gathered", True), ("forward", False), ("backward", False)]
)
def test_a_peer_that_is_cut_off_is_seen_within_a_meeting_and_a_slow_pass_is_none(
    gpu: Gpu, work: str, is_meeting: bool
) -> None:
    """Who watches the ranks ends them within seconds of a meeting that all came to; computing may take minutes."""
    meetings = Meetings(gpu.seen)
    replicas = Replicas(torch.device("cuda"), meetings)
    begin(replicas, gpu)
    gpu.hangs.add(work)
    thread = threading.Thread(target=end, args=(replicas, gpu))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert (meetings.entered > meetings.left) == is_meeting
    gpu.go_on.set()
    thread.join(30.0)
    assert meetings.entered == meetings.left == 3


def test_an_exchange_that_fails_after_it_was_begun_is_a_lost_rank(gpu: Gpu) -> None:
    replicas = Replicas(torch.device("cuda"), Meetings(gpu.seen))
    begin(replicas, gpu)
    gpu.fails.add("gathered")
    with pytest.raises(Unavailable, match="rank 0 of 2 does not reach the others: gathered failed") as caught:
        end(replicas, gpu)
    assert caught.value.reason == "RANK_LOST"


@pytest.mark.parametrize("work", ["forward", "backward"])
def test_a_fault_of_the_device_is_its_own(gpu: Gpu, work: str) -> None:
    replicas = Replicas(torch.device("cuda"), Meetings(gpu.seen))
    begin(replicas, gpu)
    gpu.fails.add(work)
    with pytest.raises(RuntimeError, match=f"{work} failed"):
        end(replicas, gpu)
