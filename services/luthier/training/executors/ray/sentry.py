"""What watches the ranks of one node: an actor beside them, since a rank that computes may have no moment to speak."""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.runtime.config import read
from luthier.runtime.home import keep_private
from luthier.storage.files import exclusive
from luthier.training.executors.pulse import shown
from luthier.work.worker_config import WorkerConfig

_SEE_SECONDS = 0.5
_LOCK = ".lock"
_SWEEPING = ".sweeping"
_logger = logging.getLogger(__name__)


def node_home() -> Path:
    """Return the folder of ranks on this node, in the home that its environment names (LUTHIER_HOME)."""
    keep_private()
    folder = read(WorkerConfig, section="WORKER").home / "ray"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Sentry:
    """Tells the post what the ranks of its node show, until its process ends.

    Folders that attempts before it have left here go first: nobody holds them.

    Args:
        post: told.
        attempt: names the folder where ranks show it.
    """

    def __init__(self, post: Any, attempt: str) -> None:
        self._post = post
        home = node_home()
        self._folder = home / attempt
        self._lock = swept(home, self._folder)
        threading.Thread(target=self._see, name="sentry", daemon=True).start()

    def version(self) -> str:
        """Return the version of the code here."""
        return importlib.metadata.version("luthier")

    def leave(self) -> None:
        """Delete what the attempt has left here."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _see(self) -> None:
        while True:
            time.sleep(_SEE_SECONDS)
            sights = {}
            for path in self._folder.glob("pulse-*[0-9]"):
                if (one := shown(path)) is not None:
                    sights[int(path.name.rpartition("-")[2])] = one
            if sights:
                self._post.see.remote(sights)


def swept(home: Path, folder: Path) -> Any:
    """Delete what attempts that are over have left in a home, and make a folder of it that is known to be in use.

    It is in use for as long as what is returned is open. Of several sentries of a node one sweeps at a time: a folder
    that another one has made and does not hold yet would look as if it were left.
    """
    with exclusive(home / _SWEEPING):
        for left in _left(home):
            shutil.rmtree(left, ignore_errors=True)
        return _held(folder)


def _held(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _left(home: Path) -> Iterator[Path]:
    """Yield the folders of attempts that are over."""
    for folder in home.iterdir():
        if not folder.is_dir():
            continue
        try:
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except FileNotFoundError:
            pass  # it was never held, or is on its way out
        yield folder
