"""What goes wrong around a child's work: what it cannot read, kills of others, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.work.test_children import CHILD, PATIENCE, Wanting

from luthier.errors import LuthierError, Unavailable
from luthier.work.children import Children, Program
from luthier.work.nursery import Child


@pytest.fixture
def program(tmp_path: Path) -> Program:
    (tmp_path / "child.py").write_text(CHILD)
    return Program(command=("-P", str(tmp_path / "child.py")), setup={"folder": str(tmp_path)})


@pytest.fixture
def children(program: Program) -> Iterator[Children]:
    with Children(program, PATIENCE, lambda: 0) as found:
        yield found


def test_what_the_kernel_ended_while_a_child_waited_for_work_does_not_count(program: Program) -> None:
    counted = [0]
    with Children(program, PATIENCE, lambda: counted[0]) as children:
        children.require_ready()
        counted[0] = 1
        with pytest.raises(Unavailable, match="was ended by SIGKILL, from outside") as caught:
            children.run(("killed", ""), {}, Wanting())
    assert caught.value.reason == "CRASHED"


@pytest.mark.parametrize(
    ("what", "num_killed", "reason"),
    [
        ("killed when asked", 0, "CRASHED"),
        ("killed when asked", 1, "OUT_OF_MEMORY"),
        ("ended by asking", 0, "STALLED"),
    ],
)
def test_a_child_that_is_killed_while_it_is_asked_where_it_hangs_is_told_as_killed(
    program: Program, tmp_path: Path, what: str, num_killed: int, reason: str
) -> None:
    """One that is short of memory hangs first, and is ended by the kernel then; the same again would end so again."""
    patience = replace(PATIENCE, still_seconds=0.5)
    with (
        Children(program, patience, lambda: num_killed * (tmp_path / "asked").exists()) as children,
        pytest.raises(LuthierError) as caught,
    ):
        children.run((what, str(tmp_path)), {}, Wanting())
    assert caught.value.reason == reason


class Unreadable:
    """What the other end cannot make sense of."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("x",)


def test_a_child_that_cannot_read_what_it_is_told_ends(children: Children) -> None:
    """It would hear of nothing any more, the end of its driver among it."""
    with pytest.raises(Unavailable, match="was ended by SIGKILL") as caught:
        children.run(Unreadable(), {}, Wanting())
    assert caught.value.reason == "CRASHED"


@pytest.mark.parametrize("error", [OSError("no room for a process"), Unavailable("no work begins any more")])
def test_work_that_is_done_is_done_though_no_other_child_can_be_prepared(
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(children, "warm", fail)
    assert children.run(("fine", ""), {}, Wanting()) == "fine"
    assert f"no process could be prepared for the next work: {error}" in caplog.messages


def test_a_child_that_cannot_be_let_go_of_is_not_counted_for_ever(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Child.end

    def fail(child: Child) -> None:
        end(child)
        raise TimeoutError("it does not become a child of this one")

    with monkeypatch.context() as patch:
        patch.setattr(Child, "end", fail)
        with pytest.raises(TimeoutError):
            children.run(("fine", ""), {}, Wanting())
    assert children.num_running == 0
