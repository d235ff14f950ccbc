"""Who does not come: shown by pulses that are written here, and by ranks whose connections are cut for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.training.executors.partitions import cut_off
from tests.training.recipes.crews import on_ranks

from luthier.errors import Unavailable
from luthier.training.executors.pulse import BEAT_SECONDS, Pulse, shown
from luthier.training.executors.ranks import pulse_path
from luthier.training.executors.vigil import Bounds, Vigil
from luthier.training.recipes.collective import Collective
from luthier.training.recipes.process_group import Replicas

NOBODY = 2**22 + 5
"""No process has this id: nothing is known of what it computes."""


class Ranks:
    """Pulses of made-up ranks, and a clock that goes on with every look."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.state = [[NOBODY, 0, 0, 0, 0, 0] for _ in range(count)]
        self.now = 0.0
        looks = [partial(shown, pulse_path(folder, rank)) for rank in range(count)]
        self.vigil = Vigil(looks, Bounds(bytes_per_second=1e6), lambda: self.now)

    def show(self) -> None:
        for rank, values in enumerate(self.state):
            data = b"".join(value.to_bytes(8, sys.byteorder) for value in values)
            pulse_path(self.folder, rank).write_bytes(data)

    def look(self, seconds: float, beating: tuple[int, ...], gone: tuple[int, ...] = ()) -> None:
        """Let some beat for so long, and look all the while."""
        for _ in range(round(seconds / BEAT_SECONDS)):
            for rank in beating:
                self.state[rank][1] += 1
            self.show()
            self.now += BEAT_SECONDS
            self.vigil.look(gone)


def lost(ranks: Ranks, seconds: float, beating: tuple[int, ...], reason: str = "RANK_LOST") -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        ranks.look(seconds, beating)
    assert caught.value.reason == reason
    return caught.value


def test_a_rank_that_neither_beats_nor_computes_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.look(100.0, (0, 1, 2))
    ranks.look(4.0, (0, 2))
    ranks.look(100.0, (0, 1, 2))
    error = lost(ranks, 8.0, (0, 2))
    assert (error.metadata["rank"], error.message) == ("1", "rank 1 of 3 hangs, with no sign of life for 5 s")


def test_a_rank_that_beats_and_sleeps_for_nobody_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.state[1][5] = 8
    ranks.look(60.0, (0, 1))
    ranks.state[1][5] = 9
    error = lost(ranks, 1.0, (0, 1), "STALLED")
    assert error.metadata["rank"] == "1"
    assert error.message == "rank 1 of 2 sleeps for 4 s in a wait that nothing in it ends"


def test_a_rank_that_sleeps_hides_none_that_is_lost(tmp_path: Path) -> None:
    """It is found first, and is found with every look as long as it is asked where it is."""
    ranks, found = Ranks(tmp_path, 2), []
    ranks.look(5.0, (0, 1))
    ranks.look(4.0, (0,))
    ranks.state[0][5] = 9
    for _ in range(round(3.0 / BEAT_SECONDS)):
        try:
            ranks.look(BEAT_SECONDS, (0,))
        except Unavailable as error:
            found.append((error.reason, error.metadata["rank"]))
    assert found[0] == ("STALLED", "0")
    assert found[-1] == ("RANK_LOST", "1")


def test_those_that_others_wait_for_are_told(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    for state, entered in zip(ranks.state, (7, 6, 7), strict=True):
        state[2:4] = [entered, 6]
    ranks.show()
    assert ranks.vigil.awaited() == [1]
    assert ranks.vigil.awaited(gone=(1,)) == []
    ranks.state[1][2] = 7
    ranks.show()
    assert ranks.vigil.awaited() == []


def test_one_that_waits_for_another_may_wait_for_long(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.state[0][2:4] = [7, 6]
    ranks.state[1][2:4] = [6, 6]
    ranks.look(1000.0, (0, 1))


@pytest.mark.parametrize(("num_bytes", "seconds"), [(0, 5.0), (10_000_000, 15.0)])
def test_ranks_that_all_came_and_do_not_end_are_apart(tmp_path: Path, num_bytes: int, seconds: float) -> None:
    ranks = Ranks(tmp_path, 2)
    for state in ranks.state:
        state[2:5] = [7, 6, num_bytes]
    ranks.look(seconds, (0, 1))
    error = lost(ranks, 2.0, (0, 1))
    assert error.metadata["rank"] == "0,1"
    assert "did not end exchange 7, to which all came" in error.message


def test_one_that_ended_an_exchange_has_left_the_other_in_it(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.state[0][2:4] = [8, 7]
    ranks.state[1][2:4] = [7, 6]
    assert lost(ranks, 8.0, (0, 1)).metadata["rank"] == "1"


def test_a_driver_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.look(5.0, (0, 1))
    ranks.now += 3600.0
    ranks.vigil.look()
    ranks.look(5.0, (0, 1))


def test_a_rank_that_is_done_need_not_beat(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.look(5.0, (0, 1))
    ranks.look(100.0, (0,), gone=(1,))


def test_a_rank_that_does_not_begin_is_named(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1)
    looks = [partial(shown, path) for path in (pulse_path(tmp_path, 0), tmp_path / "never")]
    ranks.vigil = Vigil(looks, clock=lambda: ranks.now)
    ranks.look(590.0, (0,))
    assert lost(ranks, 20.0, (0,)).message == "rank 1 of 2 did not begin with the others"


def test_a_pulse_shows_exchanges_and_beats_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    assert shown(path) is None
    pulse = Pulse(path)
    pulse.enter(64)
    found = shown(path)
    assert found is not None
    assert (found.pid, found.entered, found.left, found.num_bytes) == (os.getpid(), 1, 0, 64)
    pulse.leave()
    deadline = time.monotonic() + 20.0
    while (found := shown(path)) is None or found.beats < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.left == 1
    pulse.close()
    beats = found.beats
    time.sleep(2 * BEAT_SECONDS)
    assert (last := shown(path)) is not None
    assert last.beats in {beats, beats + 1}, "one more may have come before it was closed"
    assert (last.entered, last.left) == (1, 1)


BEATING = (
    "import sys, time; from pathlib import Path; from luthier.training.executors.pulse import Pulse; "
    + ("Pulse(Path(sys.argv[1])); time.sleep(600)")
)


@contextmanager
def beating(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", BEATING, str(path)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_process_that_is_stopped_is_lost_in_time(tmp_path: Path) -> None:
    path = tmp_path / "pulse"
    vigil = Vigil([partial(shown, path)])
    with beating(path) as process:
        while shown(path) is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="rank 0 of 1 hangs"):
            _watch(vigil, 20.0)
        assert time.monotonic() - began < 9.0


def _watch(vigil: Vigil, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        vigil.look()
        time.sleep(0.1)


@pytest.mark.parametrize("num_elements", [1, 50_000_000])
def test_ranks_that_do_not_reach_one_another_are_lost_in_ten_seconds_whatever_they_sum(
    num_elements: int, tmp_path: Path
) -> None:
    """The bounds are those of a worker. Both ranks live, and 200 MB in one exchange would be given 15 s."""

    def work(collective: Collective) -> tuple[str, str, float]:
        pulse = Pulse(pulse_path(tmp_path, collective.rank))
        ranks = Replicas(torch.device("cpu"), pulse)
        ranks.sum_counts([1.0])
        (tmp_path / f"came-{ranks.rank}").touch()
        while len(list(tmp_path.glob("came-*"))) < 2:
            time.sleep(0.01)
        assert cut_off(os.getpid()) > 0
        gradients = [torch.ones(num_elements)]
        began = time.monotonic()
        threading.Thread(target=ranks.sum_gradients, args=(gradients,), daemon=True).start()
        vigil = Vigil([partial(shown, pulse_path(tmp_path, rank)) for rank in (0, 1)])
        try:
            _watch(vigil, 30.0)
        except Unavailable as error:
            return error.reason or "", error.message, time.monotonic() - began
        return "", "both think that they reach one another", 0.0

    for reason, message, seconds in on_ranks(2, tmp_path / "ranks", work):
        assert reason == "RANK_LOST"
        assert "do not reach one another" in message
        assert 5.0 < seconds < 10.0
