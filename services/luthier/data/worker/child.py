"""The process of one building or rendering: `python -m luthier.data.worker.child`.

`luthier.work.nursery` starts the process that it is forked from. It has no connection, no credential and no setting.
"""

from __future__ import annotations

from pathlib import Path
from sqlite3 import SQLITE_FULL

from luthier.data.worker.computing import built, rendered
from luthier.data.worker.order import BuildOrder, BuiltVersion
from luthier.data.worker.version_rendering import RenderedVersion, RenderOrder
from luthier.runtime.logs import configure
from luthier.storage.disk import found_full, is_full
from luthier.work.child import Line, serve
from luthier.work.text_pool import TEXT_LIMITS


def main() -> None:
    """Do what the driver orders."""
    serve(lambda _: work, configure)


def work(line: Line, order: BuildOrder | RenderOrder) -> BuiltVersion | RenderedVersion:
    """Do an order. Raises as `built` and `rendered`."""
    desk = ChildDesk(line)
    try:
        if isinstance(order, BuildOrder):
            return built(order, desk)
        return rendered(order, desk, TEXT_LIMITS)
    except Exception as error:
        folder = order.folder if isinstance(order, BuildOrder) else Path(order.output_folder)
        if full := found_full(error, folder, _tells_full):
            raise full from error
        raise


def _tells_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk is full: what is sorted here is sorted in files of SQLite's."""
    return is_full(error) or getattr(error, "sqlite_errorcode", None) == SQLITE_FULL


class ChildDesk:
    """The driver as the process that computes sees it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def check(self) -> None:
        """Go on: the driver ends this process when the work is wanted no more."""
        self._line.alive()

    def progress(self, phase: str, completed: int, total: int, unit: str) -> None:
        """Report progress."""
        self._line.tell("progress", (phase, completed, total, unit))


if __name__ == "__main__":
    main()
