"""The TypeScript client with real services and workers: its own tests, and the programs of its README."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.e2e.conftest import Cluster
from tests.e2e.typescript_suites import NEEDS_NODE, SUITES, run_suite
from tests.work.judge_stub import Stub, judge_stub

pytestmark = [pytest.mark.e2e, pytest.mark.long, NEEDS_NODE]


@pytest.fixture(scope="module")
def judge() -> Iterator[Stub]:
    with judge_stub() as running:
        yield running


@pytest.mark.parametrize("suite", SUITES)
def test_the_typescript_client_does_with_services_what_it_says(
    cluster: Cluster, judge: Stub, suite: str
) -> None:
    run_suite(suite, cluster.environment() | {"JUDGE_URL": judge.url})
