"""What ends the reading of a tokenizer is named as what ends a registration; meanwhile it goes on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.lm.made_models import model_folder as bpe_folder
from tests.training.worker.hostile_tokenizers import HOSTILE, make_hostile

from luthier.errors import InvalidArgument, LuthierError, Reason
from luthier.lm.sources import DirectorySource
from luthier.training.worker import tokenizers_apart as module
from luthier.training.worker.child import prepare
from luthier.training.worker.order import RegisterOrder
from luthier.training.worker.tokenizers_apart import tokenizers_apart
from luthier.work import control_groups
from luthier.work.device import Setup
from luthier.work.limited_child import Limits


def find_no_room() -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device")


def be_killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fail() -> dict[str, Any]:
    raise KeyError("merges")


ENDS = {
    "a full disk": (find_no_room, Reason.DISK_FULL, "the disk is full"),
    "a kill": (be_killed, Reason.CRASHED, "the process that did the work was ended by SIGKILL, from outside"),
    "a failure": (fail, Reason.MODEL_INVALID, "the model's tokenizer fails: KeyError: 'merges'"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_that_nobody_meant_is_named(tmp_path: Path, name: str) -> None:
    work, reason, said = ENDS[name]
    with pytest.raises(LuthierError, match=said) as caught:
        tokenizers_apart(tmp_path, lambda: None)(work)
    assert caught.value.reason == reason


def test_a_kill_of_the_kernel_is_for_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter((3, 4))
    monkeypatch.setattr(control_groups, "oom_kills", lambda: next(kills))
    with pytest.raises(LuthierError, match="ended by the kernel for want of memory") as caught:
        tokenizers_apart(tmp_path, lambda: None)(be_killed)
    assert caught.value.reason == Reason.OUT_OF_MEMORY


REGISTERING = """
import resource, sys
from pathlib import Path
from luthier.errors import InvalidArgument
from luthier.lm.sources import DirectorySource
from luthier.training.worker import tokenizers_apart
from luthier.training.worker.child import prepare
from luthier.training.worker.order import RegisterOrder
from luthier.work.device import Setup
from luthier.work.limited_child import Limits

class Line:
    def alive(self): pass

tokenizers_apart.LIMITS = Limits(cpu_seconds=2, memory_bytes=512 << 20)
work = prepare(Setup(device="cpu", num_threads=1, log_level="INFO"))
scratch = Path(sys.argv[1])
for name in sys.argv[2:]:
    source = DirectorySource(path=scratch / name)
    try:
        work(Line(), RegisterOrder(source=source, directory=scratch / f"made-{name}", scratch=scratch))
    except InvalidArgument as error:
        print("refused", error.message)
print("peak", max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def test_a_tokenizer_that_takes_too_much_takes_no_more_than_its_limit(
    model_folder: Path, tmp_path: Path
) -> None:
    for name in HOSTILE:
        shutil.copytree(model_folder, tmp_path / name)
        make_hostile(tmp_path / name, name)
    words = [sys.executable, "-c", REGISTERING, str(tmp_path), *HOSTILE]
    lines = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    refused = [line.rpartition("more than ")[2] for line in lines if line.startswith("refused")]
    assert refused == ["512 MiB of memory", "2 s of CPU time"]
    (peak_kib,) = [int(line.removeprefix("peak ")) for line in lines if line.startswith("peak")]
    assert peak_kib < 2 << 20, "no process had more than 2 GiB"


EXPORTING = """
import os, sys, threading
from pathlib import Path
from luthier.training.worker.child import begin, prepare
from luthier.training.worker.order import MakeOrder
from luthier.work.device import Setup

class Line:
    def alive(self): pass

def look():
    names = [thread.name for thread in threading.enumerate()]
    print("fork", names, len(os.listdir("/proc/self/task")), flush=True)

setup = Setup(device="cpu", num_threads=1, log_level="INFO")
begin(setup)
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.register_at_fork(before=look)
model, scratch = Path(sys.argv[1]), Path(sys.argv[2])
prepare(setup)(Line(), MakeOrder(
    model=model, adapter=None, form="F16", title="", directory=scratch / "made", scratch=scratch
))
"""


def test_a_child_that_has_loaded_a_gguf_file_forks_with_no_thread_of_its_libraries(
    tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    """What shows how far a file is read would start one that stays. The child is forked, as those of a worker are."""
    model = bpe_folder(tiny_llama(vocab_size=270), tmp_path / "model")
    words = [sys.executable, "-c", EXPORTING, str(model), str(tmp_path)]
    ended = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    forks = [line for line in ended.stdout.splitlines() if line.startswith("fork")]
    assert forks == ["fork ['MainThread'] 1"] * 2, "before weights, and behind the file"


class Line:
    """A line to a driver that counts how often it hears that the work goes on."""

    heard = 0

    def alive(self) -> None:
        self.heard += 1


def test_a_child_says_that_it_goes_on_while_a_tokenizer_is_read(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver would take it for hung: it waits, and computes nothing."""
    make_hostile(model_folder, "processor")
    monkeypatch.setattr(module, "LIMITS", Limits(wall_seconds=0.6))
    work = prepare(Setup(device="cpu", num_threads=1, log_level="INFO"))
    line: Any = Line()
    source = DirectorySource(path=model_folder)
    order = RegisterOrder(source=source, directory=tmp_path / "made", scratch=tmp_path)
    with pytest.raises(InvalidArgument, match=r"the model's tokenizer takes more than 0\.6 s") as caught:
        work(line, order)
    assert caught.value.reason == Reason.MODEL_INVALID
    assert line.heard >= 3
