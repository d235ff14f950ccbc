"""Registrations in processes of their own: they hang and die alone, and change nothing in the worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

# A process of its own: the registrar forks, which a process with threads must not.
SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
from luthier.errors import InvalidArgument, LuthierError
from luthier.lm.register import DirectorySource, RegisteredFiles
from luthier.training.worker import registrar as module

def fake(source, directory, *, scratch):
    torch.set_default_dtype(torch.float64)
    what = source.path.name
    if what == "hang":
        os.mkfifo(scratch / "pipe")
        open(scratch / "pipe").read()
    elif what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "full":
        raise MemoryError("12 GB")
    elif what == "odd":
        raise KeyError("surprise")
    elif what == "bad":
        raise InvalidArgument("no model", reason="MODEL_INVALID")
    elif what == "compute":
        end = time.monotonic() + 4
        while time.monotonic() < end:
            sum(range(1000))
    return RegisteredFiles(
        files=(("config.json", directory / "config.json"),), architecture="A", num_parameters=os.getpid(),
        context_length=1, vocab_size=1, dtype="bfloat16", has_chat_template=False, eos_token_ids=(),
        end_of_turn_token_ids=(),
    )

module.register_source = fake
registrar = module.Registrar(2, stall_seconds=2.0)
root = Path(sys.argv[1])

def attempt(what, check=lambda: None):
    scratch = root / f"scratch-{threading.get_ident()}-{time.monotonic_ns()}"
    scratch.mkdir()
    try:
        made = registrar.register(DirectorySource(path=Path(what)), scratch / "out", scratch, check)
    except (LuthierError, MemoryError) as error:
        return [getattr(error, "reason", "memory"), str(error)]
    return ["made", made.num_parameters]

def say(value):
    print(json.dumps(value), flush=True)

answers = {}
def put(what):
    answers[what] = attempt(what)
both = [threading.Thread(target=put, args=(what,)) for what in ("hang", "compute")]
[thread.start() for thread in both]
[thread.join() for thread in both]
for what in ("die", "full", "odd", "bad", "fine"):
    put(what)
answers["worker"] = [os.getpid(), str(torch.get_default_dtype())]

end = time.monotonic() + 0.5
def check():
    if time.monotonic() > end:
        raise InvalidArgument("asked to stop", reason="CANCELLED_BY_USER")
answers["stopped"] = attempt("hang", check)
answers["after"] = [attempt("fine")[0] for _ in range(3)]

answers["templates"] = [template._process.pid for template in registrar._templates]
say(answers)
registrar._stall_seconds = 600.0
(root / "last").mkdir()
registrar.register(DirectorySource(path=Path("hang")), root / "out", root / "last", lambda: None)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the worker's process said, and which processes were there and are there after it was killed."""
    folder = tmp_path_factory.mktemp("registrar")
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        told = json.loads(worker.stdout.readline())
        deadline = time.monotonic() + 60
        while not (folder / "last" / "pipe").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        told["children"] = [pid for template in told["templates"] for pid in _children(template)]
        worker.send_signal(signal.SIGKILL)
    family = [*told["templates"], *told["children"]]
    while any(map(_runs, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    told["left"] = [pid for pid in family if _runs(pid)]
    return told


def test_what_hangs_or_dies_does_so_alone(answers: Any) -> None:
    assert answers["hang"][0] == "STALLED"
    assert "stood still for 2 s" in answers["hang"][1]
    assert answers["compute"][0] == "made", "it computes for longer than it may stand still"
    assert answers["die"] == ["WORKER_LOST", "the process that registers the model ended with code -11"]
    assert answers["full"] == ["memory", "12 GB"]
    assert answers["odd"] == ["INTERNAL", "KeyError: 'surprise'"]
    assert answers["bad"] == ["MODEL_INVALID", "no model"]
    assert answers["fine"][0] == "made"
    assert answers["fine"][1] != answers["worker"][0], "another process did it"
    assert answers["worker"][1] == "torch.float32", "a training beside it makes the tensors it means"


def test_a_registration_that_nobody_wants_any_more_is_ended(answers: Any) -> None:
    assert answers["stopped"] == ["CANCELLED_BY_USER", "asked to stop"]
    assert answers["after"] == ["made"] * 3


def test_no_process_outlives_a_worker_that_is_killed(answers: Any) -> None:
    assert len(answers["children"]) == 1
    assert answers["left"] == []


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
