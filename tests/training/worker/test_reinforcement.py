"""Reinforcement by a worker of a real Training service: what is learnt, kept, told, and gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.training.conftest import prompt_rows
from tests.training.worker.conftest import Site, job_of
from tests.training.worker.test_weights import ended

from luthier.errors import FailedPrecondition, Reason, Unavailable
from luthier.errors.status import status_to_failure
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, ReinforcementConfig
from luthier.v1.grader_pb2 import Grader, RegexGrader, RemoteGrader, ScoreRange, StringCheckGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PROMPT
from luthier.v1.reward_service_pb2 import SampleScore, ScoreRequest, ScoreResponse
from luthier.v1.reward_service_pb2_grpc import RewardServiceServicer, add_RewardServiceServicer_to_server
from luthier.v1.rollout_pb2 import Rollout
from luthier.v1.training_service_pb2 import ListRolloutsRequest
from luthier.work import attempts
from luthier.work.context import TaskContext
from luthier.work.session import TaskSession
from luthier.worker.v1.task_pb2 import BlobFile

Answer = Callable[[ScoreRequest], Awaitable[ScoreResponse]]
LOW = Grader(name="low", regex=RegexGrader(input="{{sample.output_text}}", pattern=r"^(w[1-3]\d ?|w\d )"))
"""Whether an answer begins with a low word."""


@pytest.fixture
def prompts(site: Site) -> Site:
    """The site, whose rendering holds prompts."""
    site.data.rows = prompt_rows(20)
    site.data.kind = RENDERING_KIND_PROMPT
    return site


async def registered(site: Site, folder: Path) -> None:
    site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest


def reinforcement(
    grader: Grader = LOW, *, steers: dict[str, Any] | None = None, **config: Any
) -> FineTuningJob:
    steering = {
        "batch_rows": 8,
        "batch_tokens": None,
        "learning_rate": 2e-2,
        "num_epochs": 5,
        **(steers or {}),
    }
    job = job_of(**steering)
    chosen = {"num_samples": 6, "max_new_tokens": 4, **config}
    job.reinforcement.CopyFrom(ReinforcementConfig(grader=grader, **chosen))
    return job


async def rollouts_of(site: Site, job: FineTuningJob, step: int) -> list[Rollout]:
    found: list[Rollout] = []
    token = ""
    while True:
        request = ListRolloutsRequest(parent=job.name, page_token=token, page_size=1000)
        answer = await site.jobs.ListRollouts(request, metadata=site.metadata)
        found += answer.rollouts
        token = answer.next_page_token
        if not token:
            return [one for one in found if one.step == step]


async def failed(site: Site, job_id: str, wanted: FineTuningJob) -> FineTuningJob:
    job = await site.ended((await site.create_job(job_id, wanted)).name)
    assert job.state == FineTuningJob.STATE_FAILED
    return job


def reason_of(job: FineTuningJob) -> str:
    return status_to_failure(job.error).reason


async def test_answers_that_are_rewarded_become_likelier(prompts: Site, model_folder: Path) -> None:
    async with prompts.worker():
        await registered(prompts, model_folder)
        job = await ended(prompts, "one", reinforcement(steers={"num_epochs": 20}))
    metrics = await prompts.metrics(job.name)
    assert len(metrics) == 40
    first, last = (sum(one["reward_mean"] for one in some) / 10 for some in (metrics[:10], metrics[-10:]))
    assert last > first + 0.08  # the mean of 480 answers scatters by 0.02
    assert "validation_reward" in metrics[-1]
    assert max(one.get("sampler_trainer_gap", 0.0) for one in metrics) < 0.02  # that of bfloat16
    drawn = await rollouts_of(prompts, job, 1)
    assert len(drawn) == 8 * 6
    assert [(one.group, one.sample) for one in drawn] == [
        (group, place) for group in range(8) for place in range(6)
    ]
    for one in drawn:
        row = prompts.data.rows[one.row]
        assert tuple(one.prompt_token_ids) == row.input_ids
        assert one.prompt_text == " ".join(f"w{token}" for token in row.input_ids)
        shown = [token for token in one.token_ids if token != 2]
        assert one.output_text == " ".join(f"w{token}" for token in shown)
        assert one.reward == float(one.output_text.startswith(("w1", "w2", "w3")) or shown[0] < 10)
        assert len(one.logprobs) == len(one.token_ids) <= 4
        assert (one.filename, one.line, one.record_id) == ("a.jsonl", one.row + 1, f"{one.row:064x}")
    mean = sum(one.reward for one in drawn) / len(drawn)
    assert metrics[0]["reward_mean"] == pytest.approx(mean)
    assert sum(one.advantage for one in drawn) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
async def test_rollouts_that_were_kept_are_learnt_from_and_the_end_has_the_same_bits(
    prompts: Site, model_folder: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends when the answers of step 5 are kept, before their update; its checkpoint is of step 3."""
    wanted = reinforcement(kl_weight=0.05)
    if full:
        wanted.full.CopyFrom(FullConfig())
    commit = TaskContext.commit_rollouts
    broken: list[int] = []
    steps: list[tuple[int, str]] = []

    def commit_and_die(self: TaskContext, step: int, path: Path) -> None:
        commit(self, step, path)
        steps.append((step, self.task.subject))
        if step == 5 and self.task.subject.endswith("broken") and not broken:
            broken.append(step)
            raise Unavailable("the worker shuts down", reason=Reason.SHUTTING_DOWN)

    monkeypatch.setattr(TaskContext, "commit_rollouts", commit_and_die)
    async with prompts.worker():
        await registered(prompts, model_folder)
        whole = await ended(prompts, "whole", wanted)
        again = await ended(prompts, "broken", wanted)
        logs = [event.log.text async for event in prompts.watch(again.name) if event.HasField("log")]
    assert broken == [5]
    assert (whole.num_attempts, again.num_attempts) == (1, 2)
    assert [step for step, subject in steps if subject == again.name] == list(range(1, 11))
    assert [text for text in logs if "answers that were kept" in text] == [
        f"step {step} learns from the 48 answers that were kept" for step in (4, 5)
    ]
    assert await prompts.metrics(again.name) == await prompts.metrics(whole.name)
    digests = [
        [(checkpoint.step, checkpoint.digest) for checkpoint in await prompts.checkpoints(name)]
        for name in (whole.name, again.name)
    ]
    assert digests[0] == digests[1]


async def test_rollouts_whose_bytes_went_meanwhile_are_sent_again(
    prompts: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, lost = TaskSession.commit_rollouts, [1, 2]

    async def lose_twice(self: TaskSession, step: int, file: BlobFile, num_rollouts: int) -> None:
        if lost:
            lost.pop()
            raise FailedPrecondition("blob is not here", reason=Reason.BLOB_MISSING)
        await commit(self, step, file, num_rollouts)

    monkeypatch.setattr(TaskSession, "commit_rollouts", lose_twice)
    async with prompts.worker():
        await registered(prompts, model_folder)
        job = await ended(prompts, "one", reinforcement(steers={"max_steps": 1}))
    assert (lost, job.num_attempts) == ([], 1)
    assert len(await rollouts_of(prompts, job, 1)) == 48


async def test_rewards_that_never_differ_fail_the_job(prompts: Site, model_folder: Path) -> None:
    constant = Grader(name="any", regex=RegexGrader(input="{{sample.output_text}}", pattern=".*"))
    async with prompts.worker():
        await registered(prompts, model_folder)
        job = await failed(prompts, "one", reinforcement(constant, steers={"num_epochs": 2}))
        logs = [event.log.text async for event in prompts.watch(job.name) if event.HasField("log")]
    assert reason_of(job) == Reason.NO_REWARD_SPREAD
    assert "in none of 4; the last step's mean was 1" in job.error.message
    told = [text for text in logs if "taught nothing" in text]
    assert [text.split(" taught")[0] for text in told] == ["step 1", "step 2", "step 3", "step 4"]
    assert not job.tuned_model


# gRPC decides the names of a servicer's methods.
# ruff: noqa: N802
class _Rewards(RewardServiceServicer):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def Score(self, request: ScoreRequest, context: Any) -> ScoreResponse:
        del context
        return await self._answer(request)


@asynccontextmanager
async def rewards(answer: Answer, **options: Any) -> AsyncIterator[Grader]:
    """A reward service for the length of the block, as a grader."""
    server = grpc.aio.server()
    add_RewardServiceServicer_to_server(_Rewards(answer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Grader(name="mine", remote=RemoteGrader(address=f"127.0.0.1:{port}", **options))
    finally:
        await server.stop(None)


async def test_a_reward_service_is_asked_with_the_record(prompts: Site, model_folder: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def length(request: ScoreRequest) -> ScoreResponse:
        seen.extend((sample.item_json, sample.output_text) for sample in request.samples)
        scores = [float(len(set(sample.output_text.split()))) for sample in request.samples]
        return ScoreResponse(scores=[SampleScore(score=score) for score in scores])

    async with rewards(length, range=ScoreRange(min=0, max=4)) as grader, prompts.worker():
        await registered(prompts, model_folder)
        job = await ended(prompts, "one", reinforcement(grader, steers={"max_steps": 1}))
    drawn = await rollouts_of(prompts, job, 1)
    assert {(prompts.data.rows[one.row].record, one.output_text) for one in drawn} <= set(seen)
    assert [one.reward for one in drawn] == [len(set(one.output_text.split())) for one in drawn]


async def by_words(request: ScoreRequest) -> ScoreResponse:
    return ScoreResponse(
        scores=[SampleScore(score=len(set(one.output_text.split())) / 4) for one in request.samples]
    )


async def test_a_grader_that_is_away_for_a_while_changes_nothing(prompts: Site, model_folder: Path) -> None:
    """It leaves every answer of step 3 without a score: the attempt is lost, and the next one grades them again."""
    graded: list[list[str]] = []

    async def away(request: ScoreRequest) -> ScoreResponse:
        if len(request.samples) == 48:  # of a step, and not of a validation
            graded.append([one.output_text for one in request.samples])
            if len(graded) == 3:
                await asyncio.sleep(600)
        return await by_words(request)

    wanted: dict[str, Any] = {"steers": {"num_epochs": 2}, "max_grader_errors": 48}
    async with (
        rewards(by_words) as well,
        rewards(away, timeout_seconds=0.5) as grader,
        prompts.worker(),
    ):
        await registered(prompts, model_folder)
        whole = await ended(prompts, "whole", reinforcement(well, **wanted))
        job = await ended(prompts, "one", reinforcement(grader, **wanted))
    assert (whole.num_attempts, job.num_attempts) == (1, 2)
    assert len(graded) == 5
    assert graded[2] == graded[3]
    assert await prompts.metrics(job.name) == await prompts.metrics(whole.name)
    drawn = [one for step in range(1, 5) for one in await rollouts_of(prompts, job, step)]
    assert len(drawn) == 4 * 48
    assert {one.WhichOneof("outcome") for one in drawn} == {"reward"}


async def test_a_grader_that_never_answers_fails_the_job_with_its_words(
    prompts: Site, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "LONGEST_RETRY_SECONDS", 0.1)

    async def never(request: ScoreRequest) -> ScoreResponse:
        await asyncio.sleep(600)
        return ScoreResponse(scores=[SampleScore(score=1.0) for _ in request.samples])

    async with rewards(never, timeout_seconds=0.5) as grader, prompts.worker():
        await registered(prompts, model_folder)
        async with asyncio.timeout(60):
            job = await failed(prompts, "one", reinforcement(grader, max_grader_errors=10))
    assert reason_of(job) == Reason.REWARD_SERVICE_UNAVAILABLE
    assert job.num_attempts == 5
    assert job.error.message.startswith("5 attempts were lost and no checkpoint came between them")
    assert "fewer than 10 answers may be without a score, 48 are" in job.error.message
    assert f"grader mine: reward service {grader.remote.address}: no answer within 0.5 s" in job.error.message
    assert await rollouts_of(prompts, job, 1) == [], "another attempt was to grade them"


async def test_a_grader_that_fails_on_everything_fails_the_job_with_its_words(
    prompts: Site, model_folder: Path
) -> None:
    async def refuse(request: ScoreRequest) -> ScoreResponse:
        return ScoreResponse(scores=[SampleScore(error="out of ink") for _ in request.samples])

    async with rewards(refuse) as grader, prompts.worker():
        await registered(prompts, model_folder)
        job = await failed(prompts, "one", reinforcement(grader, max_grader_errors=10))
    assert (reason_of(job), job.num_attempts) == (Reason.REWARD_FAILED, 1)
    assert "fewer than 10 answers may be without a score, 48 are" in job.error.message
    assert "it could not score this sample: out of ink" in job.error.message
    drawn = await rollouts_of(prompts, job, 1)
    assert len(drawn) == 48  # nothing is learnt from them, and they can be looked at
    assert {one.WhichOneof("outcome") for one in drawn} == {"error"}
    assert {one.advantage for one in drawn} == {0.0}


async def test_a_reward_that_is_no_number_is_none(prompts: Site, model_folder: Path) -> None:
    async def some(request: ScoreRequest) -> ScoreResponse:
        scores = [float("nan") if number % 6 == 0 else number % 2 for number in range(len(request.samples))]
        return ScoreResponse(scores=[SampleScore(score=score) for score in scores])

    async with rewards(some) as grader, prompts.worker():
        await registered(prompts, model_folder)
        few = reinforcement(grader, steers={"max_steps": 1})
        job = await ended(prompts, "few", few)
        many = await failed(prompts, "many", reinforcement(grader, max_grader_errors=8))
    (metrics,) = await prompts.metrics(job.name)
    assert metrics["num_grader_errors"] == 8
    assert metrics["reward_mean"] == pytest.approx(3 / 5)
    assert reason_of(many) == Reason.SCORE_NOT_FINITE
    assert "its score must be finite, got nan" in many.error.message


async def test_a_template_that_names_a_missing_field_fails_the_job_with_its_words(
    prompts: Site, model_folder: Path
) -> None:
    texts = {"input": "{{sample.output_text}}", "reference": "{{item.nowhere}}"}
    missing = Grader(
        name="gone", string_check=StringCheckGrader(operation=StringCheckGrader.OPERATION_EQ, **texts)
    )
    async with prompts.worker():
        await registered(prompts, model_folder)
        job = await failed(prompts, "one", reinforcement(missing, max_grader_errors=5))
    assert reason_of(job) == Reason.TEMPLATE_FIELD_MISSING
    assert job.error.message == (
        "records must have what the grader reads of them, those of 20 of 20 prompts have not; the first is a.jsonl "
        "line 1: grader gone: reference names {{item.nowhere}}, but there is no field 'nowhere' in item, which has "
        "'words'"
    )
    assert await rollouts_of(prompts, job, 1) == [], "before anything is drawn"
