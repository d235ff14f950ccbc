"""Records rendered in a limited process, and in another one when a record ended it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from luthier.data.worker.record_rendering import RecordSettings, RenderedRecord, Teaching
from luthier.work.limited import Check, LimitedProcess, spawned
from luthier.work.limited_child import Limits

_CHILD = "luthier.data.worker.render_child"


class LimitedRenderer:
    """Renders as `RecordRenderer` does, each part of a record within limits of its own.

    Every method raises LimitReached, ProcessBroken and ProcessKilled as `LimitedProcess.call`, and what `check` raises;
    after LimitReached the next record has a new process.

    Args:
        settings: how records are rendered.
        limits: what the settings may take, what asking for each row takes, and each text of a record beside that.
        folder: the process's working folder.
        check: called ten times a second; may raise to end the work.
    """

    def __init__(self, settings: RecordSettings, limits: Limits, folder: Path, check: Check) -> None:
        self._settings = settings
        self._limits = limits
        self._folder = folder
        self._check = check
        self._process: LimitedProcess | None = None

    def teaching(self) -> Teaching:
        """Return how a model is asked that learns the rows. Raises InvalidArgument as `RecordRenderer`."""
        self.close()
        self._process = spawned(_CHILD, self._limits, self._folder)
        answer = self._process.call(msgspec.to_builtins(self._settings), check=self._check)
        return msgspec.convert(answer, Teaching)

    def render(self, record: str, other: str = "") -> RenderedRecord:
        """Render a record given as its canonical JSON; `other` as `RecordRenderer.render` has it."""
        if self._process is None or not self._process.alive:
            self.teaching()
        assert self._process is not None
        answer = self._process.call({"record": record, "other": other}, check=self._check)
        return msgspec.convert(answer, RenderedRecord)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None
