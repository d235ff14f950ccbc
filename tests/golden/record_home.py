"""Make a home with every kind of resource in every state where it may rest, and record what it answers.

    python -m tests.golden.record_home tests/golden/homes/<date>-<revision>

Run it with the interpreter of the checkout that shall make the home; see README.md. Takes about two minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import MethodOptions
from tests.golden.answers import Answer, Asker, rpcs, write_answers
from tests.golden.home_files import SERVICES, pack_home
from tests.golden.making import Making, RestingCluster
from tests.golden.making_data import make_finished_data, make_resting_data
from tests.golden.making_work import make_finished_work, make_resting_work
from tests.golden.questions import Questions

PROJECTS = ("default", "other")
_NOT_OF_A_HOME = {
    "luthier.v1.EvaluationService/GenerateText",  # a worker answers it
    "luthier.v1.EvaluationService/ScoreTexts",  # a worker answers it
    "luthier.v1.EvaluationService/GradeSamples",  # all that it reads comes with the call
}


def record(folder: Path) -> None:
    """Make a home in a temporary folder and write it and its answers into `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        cluster = RestingCluster(Path(temporary) / "home")
        try:
            uploads, again = _make(cluster)
        finally:
            cluster.stop()
        write(cluster, uploads, again, folder)


def write(cluster: RestingCluster, uploads: Sequence[str], again: Sequence[Answer], folder: Path) -> None:
    """Ask the home of a cluster that is stopped, and write home and answers into `folder`."""
    try:
        # The services start anew, so that what they answer comes from the home alone.
        cluster.start(*SERVICES)
        with Asker(cluster.addresses, cluster.api_key()) as asker:
            answers = [*Questions(asker).all(PROJECTS, uploads)]
            answers += [asker.ask(answer["rpc"], answer["request"]) for answer in again]
    finally:
        cluster.stop()
    assert not (lacking := missing(answers)), f"the home lacks {', '.join(sorted(lacking))}"
    pack_home(cluster.home, folder)
    write_answers(folder, answers, cluster.home)


def _make(cluster: RestingCluster) -> tuple[list[str], list[Answer]]:
    cluster.start(*SERVICES)
    cluster.start(*(f"{service}-worker" for service in SERVICES))
    with Asker(cluster.addresses, cluster.api_key()) as asker:
        making = Making(cluster, asker)
        make_finished_data(making)
        make_finished_work(making)
        make_resting_data(making)
        make_resting_work(making)
        return making.uploads, making.repeatable


def missing(answers: Sequence[Answer]) -> set[str]:
    """Return what of the API the answers do not show: rpcs that only read, and states of resources."""
    answered = {answer["rpc"]: answer["response"] for answer in answers if "response" in answer}
    lacking = set()
    for rpc, (_, method) in rpcs().items():
        reads = method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS
        if reads and rpc not in answered and rpc not in _NOT_OF_A_HOME:
            lacking.add(rpc)
        state = method.output_type.fields_by_name.get("state")
        if reads and state is not None and state.enum_type is not None:
            seen = {one["response"]["state"] for one in answers if one["rpc"] == rpc and "response" in one}
            states = {value.name for value in state.enum_type.values if value.number}
            lacking |= {f"{method.output_type.name} in {name}" for name in states - seen}
    return lacking


if __name__ == "__main__":
    record(Path(sys.argv[1]))
