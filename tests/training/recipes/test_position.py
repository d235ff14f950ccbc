"""What a run notes of where it is stands when it does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.position import NAMED_ROWS, Mark, Position, noted

MIXTURE = Mixture(names=("own", "general"), first_rows=(0, 5), shares=(0.5, 0.5), measure="UNITS")


def test_a_pass_is_noted_by_its_step_and_rows_until_it_is_left(tmp_path: Path) -> None:
    path = tmp_path / "position"
    assert noted(path) is None
    mark = Mark(path)
    assert noted(path) is None
    mark.at((3, 4))
    assert noted(path) == Position(step=0, rows=((0, 3), (0, 4)), num_rows=2)
    mark.begin(7, range(100, 130))
    found = noted(path)
    assert found is not None
    assert (found.step, found.num_rows, len(found.rows), found.rows[-1]) == (7, 30, NAMED_ROWS, (0, 119))
    mark.at((9, 9, 9))
    mark.at(())
    assert noted(path) == Position(step=7, rows=((0, 9),), num_rows=1)
    mark.leave()
    assert noted(path) is None
    mark.at((2,))
    mark.close()
    mark.at((2,))
    assert noted(path) is None


def test_rows_of_a_mixture_are_noted_as_their_renderings_number_them(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "position", MIXTURE)
    mark.begin(1, (4, 5, 8))
    assert noted(tmp_path / "position") == Position(step=1, rows=((0, 4), (1, 0), (1, 3)), num_rows=3)


def test_what_a_process_noted_stands_when_it_was_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from luthier.training.recipes.position import Mark; "
        "Mark(Path(sys.argv[1])).begin(3, (5, 6)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "position")], check=False)
    assert ended.returncode == -9
    assert noted(tmp_path / "position") == Position(step=3, rows=((0, 5), (0, 6)), num_rows=2)


def test_a_file_that_is_no_position_says_nothing(tmp_path: Path) -> None:
    for text in (b"", b"x" * 10, b"\xff" * 344):
        (tmp_path / "position").write_bytes(text)
        assert noted(tmp_path / "position") is None


def test_to_note_a_pass_costs_no_step_anything(tmp_path: Path) -> None:
    """Some ten microseconds; a pass of the smallest model takes hundreds of them."""
    mark, rows = Mark(tmp_path / "position", MIXTURE), tuple(range(200))
    began = time.thread_time()
    for _ in range(2_000):
        mark.at(rows)
    assert time.thread_time() - began < 2_000 * 200e-6
