"""The workers that the Training service hears of, as a test says."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.work.workers import Worker


@dataclass
class Crew:
    """None, unless some are put here."""

    workers: list[Worker] = field(default_factory=list)

    def present(self) -> list[Worker]:
        return self.workers
