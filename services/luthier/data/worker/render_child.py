"""The process that runs untrusted templates: `python -m luthier.data.worker.render_child`, under limits.

It reads a `RenderPlan` and limits as JSON from standard input and holds no credential. On standard output, a JSON
object a line: `{"done", "filename", "line"}` when a batch begins, in the end `{"result"}` or `{"failure"}`.
A batch that takes too much CPU time ends the process by SIGXCPU; memory beyond the limit is a failure.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """CPU seconds a batch of records may take, and memory that all of the work may take beside the program."""

    cpu_seconds: int = 30
    memory_bytes: int = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the process reads."""

    plan: RenderPlan
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch that begins: records done before it, and where its first record stands."""

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
    at = Batch(done=0, filename="", line=0)

    def begin_batch(done: int, first: Mapping[str, Any]) -> None:
        nonlocal at
        at = Batch(done=done, filename=first["filename"], line=first["line"])
        _limit_cpu(order.limits.cpu_seconds)
        _say({"batch": dataclasses.asdict(at)})

    try:
        outcome = _render(order.plan, begin_batch)
    except MemoryError:
        outcome = {"failure": dataclasses.asdict(Failure.of(too_much_memory(at, order.limits)))}
    _say(outcome)


def too_much_memory(at: Batch, limits: Limits) -> LuthierError:
    """Return the error for a batch that asks for more memory than there is."""
    return InvalidArgument(
        f"rendering takes more than {limits.memory_bytes >> 20} MiB of memory at {at.filename}:{at.line} or one of "
        "the records after it; pass a chat_template without unbounded loops",
        reason=Reason.TEMPLATE_INVALID,
        metadata={"filename": at.filename, "line": str(at.line)},
    )


def _render(plan: RenderPlan, begin_batch: Callable[[int, Mapping[str, Any]], None]) -> dict[str, Any]:
    try:
        rendered: RenderedVersion = render_plan(plan, begin_batch)
    except LuthierError as error:
        return {"failure": dataclasses.asdict(Failure.of(error))}
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
