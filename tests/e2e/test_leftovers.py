"""What a look for leftovers finds: what a living process holds, and nothing that it has collected itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.leftovers import left_over
from tests.stores import SERVICES, service_blobs, service_urls

from luthier.data.schema import MIGRATIONS as DATA
from luthier.evaluation.schema import MIGRATIONS as EVALUATION
from luthier.storage import local_blobs
from luthier.storage.files import open_locked
from luthier.storage.migrations import upgrade
from luthier.storage.opening import blob_folder
from luthier.training.schema import MIGRATIONS as TRAINING
from luthier.work.schema import MIGRATIONS as WORK

NUM_BLOBS = 40


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home in whose Training service nobody needs what there is."""
    home = tmp_path / "home"
    for service, own in zip(SERVICES, (DATA, TRAINING, EVALUATION), strict=True):
        upgrade(service_urls(home, service)["database_url"], (WORK, own))

    async def fill() -> None:
        blobs = service_blobs(home, "training")
        for number in range(NUM_BLOBS):
            await blobs.put_bytes(b"%d" % number)

    asyncio.run(fill())
    return home


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have files that were collected stay on the disk until the test ends."""
    remove, over = local_blobs._remove, threading.Event()

    def remove_later(aside: Path) -> None:
        over.wait(60)
        remove(aside)

    monkeypatch.setattr(local_blobs, "_remove", remove_later)
    yield
    over.set()


@pytest.mark.usefixtures("slow_disk")
def test_what_the_look_itself_has_collected_is_not_left_over(home: Path) -> None:
    assert asyncio.run(left_over(home)) == []


def test_what_a_living_writer_holds_is_left_over_until_it_lets_go(home: Path) -> None:
    folder = blob_folder(service_urls(home, "training")["blobs_url"])
    with open_locked(folder / "incoming" / ("0" * 32)):
        assert asyncio.run(left_over(home)) == [f"training: {'0' * 32} is needed by nothing"]
    assert asyncio.run(left_over(home)) == []
