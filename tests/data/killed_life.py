"""Lives of bytes, killed between every two steps: `python -m tests.data.killed_life FOLDER KIND ...`.

A step is a change on the disk: a file that is moved, linked, removed or made young, or a commit. Life after life is
begun in a process of its own, and killed (SIGKILL) before its first step, its second, and so on. What it leaves is
checked, gone on with by another process as by a service that starts again, and checked once more. Prints one JSON
object: how many steps there are, by kind, and everything that was wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from tests.data.byte_lives import check, live

from luthier.data import schema as data_schema
from luthier.evaluation import schema as evaluation_schema
from luthier.storage import database as database_module
from luthier.storage.migrations import upgrade
from luthier.training import schema as training_schema
from luthier.work import schema as work_schema

FOLDERS = {
    "data": data_schema.MIGRATIONS,
    "training": training_schema.MIGRATIONS,
    "evaluation": evaluation_schema.MIGRATIONS,
}


def count_steps(kill_at: int, seen: Callable[[str], None]) -> None:
    """Have this process killed before one of its steps."""
    numbers = itertools.count(1)

    def step(kind: str) -> None:
        if next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen(kind)

    def counted(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            step(kind)
            return function(*arguments, **named)

        return call

    for name in ("rename", "link", "unlink", "utime"):
        setattr(os, name, counted(getattr(os, name), name))
    commit = database_module._Unit.commit

    async def committed(unit: Any) -> None:
        step("commit")
        await commit(unit)

    database_module._Unit.commit = committed  # type: ignore[method-assign,assignment]


def forked(work: Callable[[], Any], report: Path) -> int:
    """Do work in a process of its own; returns its status, and leaves what went wrong in a file."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        found = work()
        report.write_text("\n".join(found or ()))
        status = 0
    except BaseException:
        report.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def killed_lives(root: Path, kind: str) -> dict[str, Any]:
    """Live with a kill before each step in turn; returns the kinds of steps, and what was wrong."""
    begin, report, steps = root / kind, root / "report", root / "steps"
    wrong: list[str] = []
    begin.mkdir(parents=True)
    upgrade(f"sqlite+aiosqlite:///{begin / 'service.db'}", [work_schema.MIGRATIONS, FOLDERS[kind]])

    def life(folder: Path, kill_at: int) -> None:
        with steps.open("w", buffering=1) as file:
            count_steps(kill_at, lambda step: print(step, file=file))
            asyncio.run(live(folder, kind))

    for kill_at in itertools.count(1):
        folder = root / f"{kind}-{kill_at}"
        shutil.copytree(begin, folder)
        status = forked(partial(life, folder, kill_at), report)
        if status != -signal.SIGKILL:
            if status:
                wrong.append(f"undisturbed: {report.read_text()}")
            break
        for what, work in (("left", check), ("gone on with", live)):
            status = forked(partial(run, work, folder, kind), report)
            if status or report.read_text():
                wrong.append(f"killed before step {kill_at}, {what}: {report.read_text()}")
        shutil.rmtree(folder)
    return {"steps": Counter(steps.read_text().split()), "wrong": wrong}


def run(work: Callable[[Path, str], Coroutine[Any, Any, Any]], folder: Path, kind: str) -> Any:
    return asyncio.run(work(folder, kind))


def main() -> None:
    """Live every life."""
    root = Path(sys.argv[1])
    print(json.dumps({kind: killed_lives(root, kind) for kind in sys.argv[2:]}))


if __name__ == "__main__":
    main()
