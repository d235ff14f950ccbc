"""Homes that former code made: today's code migrates them and answers as it did."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.golden.answers import Asker, read_answers
from tests.golden.comparing import Allowed, differences, replay, unmeant, unused
from tests.golden.home_files import unpack_home
from tests.golden.making import RestingCluster

LOOKED_SECONDS = 60.0
HOMES = sorted((Path(__file__).parent / "homes").iterdir())

# What the answers of a home may differ in, by the home's name.
ALLOWED: dict[str, list[Allowed]] = {}


@pytest.fixture(scope="module", params=HOMES, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestingCluster]:
    """Services on a former home, which no test changes."""
    running = RestingCluster(tmp_path_factory.mktemp("former") / "home")
    unpack_home(folder, running.home)
    try:
        running.start("data", "training", "evaluation")
        yield running
    finally:
        running.stop()


@pytest.mark.e2e
def test_a_former_home_answers_as_it_did(folder: Path, cluster: RestingCluster) -> None:
    recorded = read_answers(folder, cluster.home)
    with Asker(cluster.addresses, cluster.api_key()) as asker:
        found = list(replay(asker, recorded))
    allowed = ALLOWED.get(folder.name, [])
    assert unmeant(found, allowed) == []
    assert unused(found, allowed) == []


@pytest.mark.e2e
def test_a_former_home_keeps_all_that_is_needed_and_nothing_else(
    folder: Path, cluster: RestingCluster
) -> None:
    """Its blobs are as old as can be: what no reference kept would be collected at the first look."""
    deadline = time.monotonic() + LOOKED_SECONDS
    while (faults := cluster.faults()) and time.monotonic() < deadline:
        time.sleep(1.0)  # What nothing needs is being collected.
    assert faults == []


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container and key of something that can be lost."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from leaves(inner)


def test_nothing_that_was_recorded_can_be_lost_unseen(folder: Path, tmp_path: Path) -> None:
    """The comparison finds every single value of an answer that is gone, and every one that is another."""
    answer = next(one for one in read_answers(folder, tmp_path) if one["rpc"].endswith("/GetEvaluation"))
    assert list(differences(answer, copy.deepcopy(answer))) == []
    for number in range(len(list(leaves(answer)))):
        for change in ("lost", "another"):
            changed = copy.deepcopy(answer)
            container, key = list(leaves(changed))[number]
            if change == "lost":
                del container[key]
            else:
                container[key] = "another"
            assert list(differences(answer, changed)), (change, container, key)


def test_what_is_new_is_no_difference() -> None:
    assert list(differences({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}], "d": 3})) == []
    assert list(differences({"a": 0}, {"a": False})) == [(".a", 0, False)]
