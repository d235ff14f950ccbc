"""The process that runs untrusted templates: `python -m luthier.data.worker.render_child`, under limits.

It reads a `RenderPlan` and limits as JSON from standard input and holds no credential. On standard output, a JSON
object a line: `{"at": {"done", "filename", "line"}}` when a record begins, in the end `{"result"}` or `{"failure"}`.
A record that takes too much CPU time ends the process by SIGXCPU; memory beyond the limit is a failure.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cattrs import Converter
from cattrs.preconf.json import make_converter

from luthier.data.worker.rendering import RenderedVersion, RenderPlan, render_plan
from luthier.errors import Failure, InvalidArgument, LuthierError, Reason
from luthier.storage.disk import disk_full, is_full


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """CPU seconds that one record may take, and memory that all of the work may take beside the program."""

    cpu_seconds: int = 30
    memory_bytes: int = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the process reads."""

    plan: RenderPlan
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A record that begins: how many are done before it, and where it stands."""

    done: int
    filename: str
    line: int


def converter() -> Converter:
    """Return the converter between the messages and JSON values."""
    made = make_converter()
    made.register_unstructure_hook(Path, str)
    made.register_structure_hook(Path, lambda value, _: Path(value))
    return made


def main() -> None:
    """Render what standard input orders."""
    order = converter().structure(json.load(sys.stdin), Order)
    _limit_memory(order.limits.memory_bytes)
    at = Begun(done=0, filename="", line=0)

    def begin(done: int, row: Mapping[str, Any]) -> None:
        nonlocal at
        at = Begun(done=done, filename=row["filename"], line=row["line"])
        _limit_cpu(order.limits.cpu_seconds)
        _say({"at": dataclasses.asdict(at)})

    try:
        outcome = _render(order.plan, begin)
    except MemoryError:
        outcome = {"failure": dataclasses.asdict(Failure.of(too_much_memory(at, order.limits)))}
    _say(outcome)


def too_much_memory(at: Begun, limits: Limits) -> LuthierError:
    """Return the error for a record that asks for more memory than there is."""
    return InvalidArgument(
        f"rendering takes more than {limits.memory_bytes >> 20} MiB of memory at "
        f"{at.filename}:{at.line}; pass a chat_template without unbounded loops",
        reason=Reason.TEMPLATE_INVALID,
        metadata={"filename": at.filename, "line": str(at.line)},
    )


def _render(plan: RenderPlan, begin: Callable[[int, Mapping[str, Any]], None]) -> dict[str, Any]:
    try:
        rendered: RenderedVersion = render_plan(plan, begin)
    except LuthierError as error:
        return {"failure": dataclasses.asdict(Failure.of(error))}
    except OSError as error:
        if not is_full(error):
            raise
        return {"failure": dataclasses.asdict(Failure.of(disk_full(str(error))))}
    return {"result": converter().unstructure(rendered)}


def _say(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _limit_cpu(seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _limit_memory(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
