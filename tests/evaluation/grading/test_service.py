"""GradeSamples over a real server: grades and errors by sample, hostile requests, and that nobody is held up."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.evaluation.conftest import Site
from tests.evaluation.evaluations.memory_peers import MemoryPeers
from tests.grading.grader_messages import (
    json_match,
    multi,
    number_match,
    regex,
    remote,
    similarity,
    string_check,
)
from tests.work.reward_services import rewarding

from luthier.client.cli import main
from luthier.errors import InvalidArgument, PermissionDenied, Reason, ResourceExhausted
from luthier.errors.status import status_to_failure
from luthier.evaluation.config import Config
from luthier.evaluation.generation.exchange import Exchange
from luthier.evaluation.generation.values import Values
from luthier.evaluation.grading import samples as samples_module
from luthier.evaluation.grading.service import MAX_GRADINGS, GradingService
from luthier.runtime.auth import TaskTokens
from luthier.runtime.config import read
from luthier.v1.evaluation_service_pb2 import GradeSamplesRequest
from luthier.v1.grader_pb2 import Grader, Sample, SampleGrade, ScoreRange
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.work.limited_child import Limits
from luthier.work.rewards import RewardAddresses

PARENT = "projects/default"
NO_MODELS = Values(Exchange(), MemoryPeers(), TaskTokens("s" * 32))
"""Nobody takes orders."""


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    running = Site(tmp_path / "home", {})
    await running.start()
    yield running
    await running.stop()


def sample(answer: Any, output_text: str) -> Sample:
    return Sample(item_json=json.dumps({"answer": answer}, ensure_ascii=False), output_text=output_text)


def request(grader: Grader, *samples: Sample) -> GradeSamplesRequest:
    return GradeSamplesRequest(parent=PARENT, grader=grader, samples=samples)


async def grades(site: Site, grader: Grader, *samples: Sample) -> list[SampleGrade]:
    asked = request(grader, *samples)
    return [grade async for response in site.stream("GradeSamples", asked) for grade in response.grades]


def reason_of(grade: SampleGrade) -> str:
    assert not grade.HasField("score")
    return status_to_failure(grade.error).reason


async def test_every_kind_gives_grades_in_the_order_of_the_samples(site: Site) -> None:
    right, wrong = sample("42", "42"), sample("42", "no")
    for grader in (
        string_check(),
        similarity("BLEU"),
        similarity("ROUGE_L"),
        number_match(),
        regex("[0-9]"),
        multi("(a + b) / 2", a=string_check(), b=regex("4")),
    ):
        found = await grades(site, grader, *[right, wrong] * 20)
        assert [one.score for one in found] == pytest.approx([1.0, 0.0] * 20)
    record = json.dumps({"a": 1, "b": 2})
    (found_one,) = await grades(site, json_match(), sample({"a": 1, "b": 3}, record))
    assert found_one.score == 0.5
    (parts,) = await grades(site, multi("0.5 * a + 0.5 * b", a=string_check(), b=regex("x")), right)
    assert dict(parts.part_scores) == {"a": 1.0, "b": 0.0}


async def test_what_cannot_be_graded_is_an_error_of_its_sample(site: Site) -> None:
    found = await grades(
        site,
        number_match(),
        sample(7, "it is 7"),
        Sample(item_json='{"other": 1}', output_text="7"),
        sample("seven", "7"),
        Sample(item_json="{", output_text="7"),
        Sample(item_json='{"answer": "\\ud800"}', output_text="7"),
    )
    assert found[0].score == 1.0
    assert [reason_of(one) for one in found[1:]] == [
        Reason.TEMPLATE_FIELD_MISSING,
        *[Reason.GRADER_INPUT_INVALID] * 3,
    ]
    assert "there is no field 'answer' in item, which has 'other'" in found[1].error.message


async def test_the_whole_request_is_refused_by_field(site: Site) -> None:
    grader = multi("a", a=regex("["))
    wanted = request(grader, *[Sample(output_text="x" * 65_537)] * 2)
    with pytest.raises(InvalidArgument) as caught:
        await anext(site.stream("GradeSamples", wanted))
    assert [one.partition(": ")[0] for one in caught.value.message.split("; ")] == [
        "samples[0].output_text",
        "samples[1].output_text",
        "grader.multi.graders['a'].regex.pattern",
    ]
    for wrong, said in (
        (
            GradeSamplesRequest(parent=PARENT),
            "grader: must be a grader, got nothing; samples: must hold 1 to 256 samples",
        ),
        (request(regex("x"), *[Sample()] * 257), "samples: must hold 1 to 256 samples, got 257"),
        (
            request(regex("x"), Sample(item_json="x" * 262_145)),
            r"samples\[0\].item_json: must be at most 262144 bytes",
        ),
        (GradeSamplesRequest(parent="x", grader=regex("x"), samples=[Sample()]), "parent"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            await anext(site.stream("GradeSamples", wrong))
    foreign = GradeSamplesRequest(parent="projects/other", grader=regex("x"), samples=[Sample()])
    with pytest.raises(PermissionDenied):
        await anext(site.stream("GradeSamples", foreign))


async def test_a_key_is_needed_and_a_workers_is_not_enough(site: Site) -> None:
    wanted = request(regex("x"), Sample())
    call = site.stub.GradeSamples(wanted, metadata=(), timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    metadata = (("authorization", f"Bearer {site.keys.worker_key}"),)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.stub.GradeSamples(wanted, metadata=metadata, timeout=20).read()
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in time")


def has_more(requests: list[ScoreRequest], count: int) -> bool:
    return len(requests) > count


def some_wrong(asked: ScoreRequest, context: Any) -> ScoreResponse:
    known = {
        "half": SampleScore(score=0.5),
        "nan": SampleScore(score=math.nan),
        "high": SampleScore(score=1.5),
        "error": SampleScore(error="no test"),
        "none": SampleScore(),
    }
    return ScoreResponse(scores=[known[one.output_text] for one in asked.samples])


async def test_a_remote_grader_is_asked_and_its_errors_are_no_scores(site: Site) -> None:
    samples = [sample("x", text) for text in ("half", "nan", "high", "error", "none")]
    with rewarding(some_wrong) as (address, rewards):
        found = await grades(site, remote(address), *samples)
        assert found[0].score == 0.5
        assert [reason_of(one) for one in found[1:]] == [
            Reason.SCORE_NOT_FINITE,
            Reason.SCORE_OUT_OF_RANGE,
            Reason.REWARD_FAILED,
            Reason.REWARD_SERVICE_INVALID,
        ]
        assert rewards.requests[0].samples[0] == samples[0]
        wide = multi("a * 2 - b", a=remote(address, range=ScoreRange(min=-2, max=2)), b=regex("half"))
        wide.multi.range.CopyFrom(ScoreRange(min=-4, max=4))
        found = await grades(site, wide, samples[0], samples[2])
        assert [one.score for one in found] == [0.0, 3.0]


async def test_a_remote_grader_that_fails_is_an_error_of_each_sample(site: Site) -> None:
    ends = threading.Event()

    def slow(asked: ScoreRequest, context: Any) -> ScoreResponse:
        ends.wait(20)
        return ScoreResponse()

    def short(asked: ScoreRequest, context: Any) -> ScoreResponse:
        return ScoreResponse(scores=[SampleScore(score=1.0)])

    three = [sample("x", "y")] * 3
    with rewarding(slow) as (address, _):
        found = await grades(site, remote(address, timeout_seconds=0.3), *three)
        ends.set()
    assert {reason_of(one) for one in found} == {Reason.REWARD_SERVICE_UNAVAILABLE}
    assert {one.error.code for one in found} == {grpc.StatusCode.UNAVAILABLE.value[0]}
    found = await grades(site, remote(address, timeout_seconds=0.3), *three)  # dead by now
    assert {reason_of(one) for one in found} == {Reason.REWARD_SERVICE_UNAVAILABLE}
    with rewarding(short) as (address, _):
        found = await grades(site, remote(address), *three)
    assert {reason_of(one) for one in found} == {Reason.REWARD_SERVICE_INVALID}
    assert "1 scores for 3 samples" in found[0].error.message


async def test_an_address_that_is_not_allowed_is_refused_with_its_field(site: Site) -> None:
    grader = multi("a", a=multi("b", b=remote("rewards.example.com:443")))
    with pytest.raises(InvalidArgument) as caught:
        await anext(site.stream("GradeSamples", request(grader, Sample())))
    assert caught.value.reason == Reason.ADDRESS_NOT_ALLOWED
    place = "grader.multi.graders['a'].multi.graders['b'].remote.address"
    assert caught.value.message.startswith(
        f"{place}: must be host:port of 127.0.0.1, which LUTHIER_REWARD_ADDRESSES"
    )


def summed(parts: dict[str, Grader]) -> Grader:
    grader = multi("+".join(parts), **parts)
    grader.multi.range.CopyFrom(ScoreRange(min=0, max=100))
    return grader


def heavy(num_similarities: int) -> tuple[Grader, Sample]:
    grader = summed({f"g{number}": similarity("FUZZY_MATCH") for number in range(num_similarities)})
    return grader, sample("ab" * 32_000, "ba" * 32_000)


async def test_a_large_request_holds_up_no_health_check(site: Site) -> None:
    grader, long = heavy(6)
    grading = asyncio.create_task(grades(site, grader, *[long] * 3))
    latencies = []
    async with grpc.aio.insecure_channel(site.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while not grading.done():
            began = time.monotonic()
            await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            latencies.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
    found = await grading
    assert all(one.HasField("score") for one in found)
    assert len(latencies) > 10
    assert max(latencies) < 1.0


HOSTILE = [
    (regex("(a|aa)+$"), Sample(output_text="a" * 65_000 + "!")),
    (regex("(?:a?){300}a{300}"), Sample(output_text="a" * 65_000)),
    (number_match(pattern="a(.)[^c]*c"), sample(1, "a" * 65_000)),
    (number_match(), sample(1, "1," * 32_000)),
    (json_match(), sample({"a": 1}, "[" * 65_000)),
    (json_match(), sample({"a": 1}, '{"a":' * 10_000)),
    (string_check(text="{{sample.output_json.a}}"), sample("x", "[" * 65_000)),
    (string_check(), Sample(item_json="[" * 200_000, output_text="x")),
    (string_check(), Sample(item_json='{"answer": ' + "9" * 100_000 + "}", output_text="x")),
    (similarity("BLEU"), sample("." * 60_000, "." * 60_000)),
    (similarity("GLEU"), sample("-\n" * 30_000, "&quot;" * 10_000)),
    (similarity("ROUGE_L"), sample("a b " * 15_000, "b a " * 15_000)),
    (string_check(), sample("\x00\x1b[31m\u202e", "\x00\x1b[31m\u202e")),
    (string_check(operation="ILIKE"), sample("\u0130" * 9_000, "\u0130" * 60_000)),
    (
        similarity("FUZZY_MATCH"),
        sample("\N{COMBINING ACUTE ACCENT}" * 60_000, "e" + "\N{COMBINING ACUTE ACCENT}" * 60_000),
    ),
]


async def test_hostile_samples_get_a_score_or_an_error_of_their_own(site: Site) -> None:
    for grader, hostile in HOSTILE:
        (found,) = await grades(site, grader, hostile)
        assert found.WhichOneof("outcome") == "score" or reason_of(found) in Reason.__members__
        assert not found.HasField("score") or 0.0 <= found.score <= 1.0


async def test_what_takes_too_much_is_refused_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(cpu_seconds=1, memory_bytes=1 << 30, wall_seconds=60.0)
    monkeypatch.setattr(samples_module, "SAMPLE_LIMITS", limits)
    grading = GradingService(RewardAddresses([]), NO_MODELS)
    grader, long = heavy(14)
    grader = summed({"first": grader, "second": grader})  # more than the limit on fast processors too
    light = sample("x", "x")
    try:
        with pytest.raises(
            InvalidArgument, match=r"samples\[1\]: grading it takes more than 1 s of CPU"
        ) as caught:
            await anext(grading.grade(request(grader, light, *[long] * 8)))
        assert caught.value.reason == Reason.GRADING_LIMIT_REACHED
        found = [one async for some in grading.grade(request(string_check(), light)) for one in some]
        assert [one.score for one in found] == [1.0]
    finally:
        grading.close()


async def test_too_many_at_once_are_told_to_come_again(site: Site) -> None:
    ends = threading.Event()

    def slow(asked: ScoreRequest, context: Any) -> ScoreResponse:
        ends.wait(30)
        return ScoreResponse(scores=[SampleScore(score=1.0)] * len(asked.samples))

    with rewarding(slow) as (address, rewards):
        wanted = (remote(address, timeout_seconds=60), sample("x", "y"))
        running = [asyncio.create_task(grades(site, *wanted)) for _ in range(MAX_GRADINGS)]
        await until(lambda: len(rewards.requests) >= 4)  # the test's server has four threads
        with pytest.raises(ResourceExhausted, match="8 calls grade samples already") as caught:
            await grades(site, *wanted)
        assert caught.value.reason == Reason.OVERLOADED
        assert caught.value.retry_after_seconds is not None
        ends.set()
        assert [[one.score for one in found] for found in await asyncio.gather(*running)] == [[1.0]] * 8
    assert [one.score for one in await grades(site, string_check(), sample("x", "x"))] == [1.0]


async def test_a_caller_who_goes_away_frees_the_place(site: Site) -> None:
    ends = threading.Event()

    def slow(asked: ScoreRequest, context: Any) -> ScoreResponse:
        ends.wait(30)
        return ScoreResponse()

    with rewarding(slow) as (address, rewards):
        for _ in range(3):
            wanted = request(remote(address, timeout_seconds=60), sample("x", "y"))
            before = len(rewards.requests)
            call = site.stub.GradeSamples(
                wanted, metadata=(("authorization", f"Bearer {site.keys.api_key}"),)
            )
            reading = asyncio.create_task(call.read())
            await until(partial(has_more, rewards.requests, before))
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        ends.set()
    started = [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]
    for thread in started:
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()


async def test_the_command_line_grades_with_the_example_service(site: Site) -> None:
    """All of it real: the example's process, its files, the command, the service and its limited process."""
    folder = Path(__file__).parents[3] / "examples" / "rewards"
    server = await asyncio.create_subprocess_exec(
        sys.executable, str(folder / "server.py"), "--port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    address = (await server.stdout.readline()).decode().split()[-1]
    files = ["-f", str(folder / "grader.yaml"), "--samples", str(folder / "samples.jsonl")]
    words = [*files, "--set", f"multi.graders.right.remote.address={address}", "--json"]
    options = [f"--home={site.home}", f"--evaluation-address={site.address}"]
    run = partial(CliRunner().invoke, main, [*options, "evaluations", "grade", *words])
    result = await asyncio.to_thread(run)
    server.terminate()
    assert await server.wait() == 0
    assert result.exit_code == 0, result.output
    right, wrong, unknown = json.loads(result.stdout)
    assert (right["score"], right["part_scores"]) == (1.0, {"form": 1.0, "right": 1.0})
    assert (wrong["score"], wrong["part_scores"]) == (0.0, {"form": 0.0, "right": 0.0})
    assert "score" not in unknown
    assert "grader right: reward service" in unknown["error"]["message"]
    assert "1 of 3 samples could not be graded" in result.stderr


def test_loopback_alone_is_allowed_unless_set_otherwise(tmp_path: Path) -> None:
    assert read(Config, section="EVALUATION", environ={}).reward_addresses == (
        "localhost",
        "127.0.0.1",
        "[::1]",
    )
    environ = {"LUTHIER_REWARD_ADDRESSES": "rewards.internal:50051"}
    allowed = RewardAddresses(read(Config, section="EVALUATION", environ=environ).reward_addresses)
    allowed.require("rewards.internal:50051", "f")
    with pytest.raises(InvalidArgument, match=r"must be host:port of rewards\.internal:50051"):
        allowed.require("127.0.0.1:50051", "f")
