"""Reinforcement by a reward model in a real worker: three jobs in a row, the values of transformers, the same bits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.training.conftest import TokenRow, rows_of_units
from tests.training.worker.conftest import PARENT, Site, SmallDataService, job_of
from tests.training.worker.test_methods import digests
from tests.training.worker.test_reinforcement import (
    LOW,
    failed,
    prompts,
    reason_of,
    reinforcement,
    rollouts_of,
)
from tests.training.worker.test_weights import downloaded, ended, model_of
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from luthier.errors import FailedPrecondition, Reason, Unavailable
from luthier.lm.load import load_model
from luthier.training.recipes.valuing import Valuer
from luthier.training.worker.answer_ends import AnswerEnd, AnswerEnds
from luthier.training.worker.reward_models import Judge, LoadedRewardModel
from luthier.v1 import model_service_pb2
from luthier.v1.evaluation_pb2 import FINISH_REASON_STOP
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, RewardModelConfig
from luthier.v1.grader_pb2 import Grader, MultiGrader, RewardModelGrader
from luthier.v1.model_pb2 import Model, Taught
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.v1.rollout_pb2 import Rollout
from luthier.work.context import TaskContext

__all__ = ["prompts"]
PAIRS, SONGS = f"{PARENT}/renderings/pairs", f"{PARENT}/renderings/songs-alone"
JUDGE = Grader(name="judge", reward_model=RewardModelGrader(model=f"{PARENT}/models/judge"))
END, PADDING = 2, 0


def pairs() -> list[TokenRow]:
    """Songs preferred to noise, both with the token that ends an answer."""
    return [
        TokenRow(
            row=one.row,
            split=one.split,
            input_ids=(*one.input_ids, END),
            loss_mask=(*one.loss_mask, True),
            unit=one.unit,
            role=one.role,
        )
        for one in rows_of_units(30, "chosen", "rejected")
    ]


async def registered(site: Site, folder: Path, token_rows: Callable[..., list[Any]]) -> None:
    """Register the base model, and know a rendering of pairs and one of songs beside that of prompts."""
    site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest
    for name, rows in ((PAIRS, pairs()), (SONGS, token_rows(20))):
        other = SmallDataService(rows, name)  # type: ignore[abstract]  # the methods that training uses
        other.tokenizer_digest = site.data.tokenizer_digest
        site.data.others[name] = other
    site.data.others[PAIRS].kind = RENDERING_KIND_PREFERENCE


def judging(*, full: bool = False) -> FineTuningJob:
    job = job_of(batch_rows=6, batch_tokens=None, learning_rate=1e-2, num_epochs=4)
    job.rendering = PAIRS
    job.reward_model.CopyFrom(RewardModelConfig())
    if full:
        job.full.CopyFrom(FullConfig())
    return job


def scored_by_transformers(
    folder: Path, base: Path, texts: Sequence[Sequence[int]], *, full: bool
) -> list[float]:
    if full:
        classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    else:
        of: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        classifier = PeftModel.from_pretrained(of, folder)
    with torch.no_grad():
        return [classifier.eval()(input_ids=torch.tensor([list(text)])).logits.item() for text in texts]


def given(one: Rollout) -> tuple[int, ...]:
    """What a reward model is given of a rollout: rows of pairs end with the token that ends an answer."""
    is_cut = one.finish_reason != FINISH_REASON_STOP
    return (
        (*one.prompt_token_ids, *one.token_ids)
        if is_cut
        else (*one.prompt_token_ids, *one.token_ids[:-1], END)
    )


# peft 0.21 still calls what transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
# The base has no head for values; PEFT brings it.
@pytest.mark.filterwarnings("ignore:Some weights of")
@pytest.mark.parametrize(
    ("full", "judge_full"),
    [(False, False), (False, True), (True, False)],
    ids=["adapters", "an adapter judged by all weights", "all weights judged by an adapter"],
)
async def test_three_jobs_in_a_row_and_the_last_one_broken_end_with_the_same_bits(
    prompts: Site,
    model_folder: Path,
    token_rows: Callable[..., list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
    judge_full: bool,
) -> None:
    """The broken attempt ends when the answers of step 5 are kept, before their update; its checkpoint is of step 3."""
    commit = TaskContext.commit_rollouts
    broken: list[int] = []
    bases: list[Any] = []

    def commit_and_die(self: TaskContext, step: int, path: Path) -> None:
        commit(self, step, path)
        if step == 5 and self.task.subject.endswith("broken") and not broken:
            broken.append(step)
            raise Unavailable("the worker shuts down", reason=Reason.SHUTTING_DOWN)

    def load_base(*words: Any, **named: Any) -> PreTrainedModel:
        bases.append(words)
        return load_model(*words, **named)

    monkeypatch.setattr(TaskContext, "commit_rollouts", commit_and_die)
    monkeypatch.setattr("luthier.training.worker.reward_models.load_model", load_base)
    async with prompts.worker():
        await registered(prompts, model_folder, token_rows)
        judge, whole, again = await in_a_row(prompts, full=full, judge_full=judge_full)
        logs = [event.log.text async for event in prompts.watch(again.name) if event.HasField("log")]
        tuned = await model_of(prompts, whole)
    assert judge.kind == Model.KIND_REWARD
    assert (whole.num_attempts, again.num_attempts, broken) == (1, 2, [5])
    assert [text for text in logs if "answers that were kept" in text] == [
        f"step {step} learns from the 48 answers that were kept" for step in (4, 5)
    ]
    metrics = await prompts.metrics(whole.name)
    assert await prompts.metrics(again.name) == metrics
    assert await digests(prompts, again) == await digests(prompts, whole)
    rewards = [one["reward_mean"] for one in metrics]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 0.4, rewards
    assert all("validation_reward" in one for one in metrics if "validation_answer_tokens" in one)
    assert judge.name in [one.name for one in tuned.references]
    # An adapter that judges an adapter of the same base shares its weights; it takes none of its own.
    assert len(bases) == (3 if full and not judge_full else 0)
    drawn = [one for step in (1, 7) for one in await rollouts_of(prompts, whole, step)]
    folder = await downloaded(prompts, judge.name, tmp_path / "judge")
    await asyncio.to_thread(assert_values, drawn, folder, model_folder, full=judge_full)


async def in_a_row(site: Site, *, full: bool, judge_full: bool) -> tuple[Model, FineTuningJob, FineTuningJob]:
    """A model of songs and a reward model; then two jobs that go on with the first and learn from the second."""
    first = job_of(max_steps=2)
    first.rendering = SONGS
    if full:
        first.full.CopyFrom(FullConfig())
    sft = await ended(site, "sft", first)
    judge = await model_of(site, await ended(site, "judge", judging(full=judge_full)))
    wanted = reinforcement(JUDGE, steers={"learning_rate": 1e-2 if full else 5e-2})
    wanted.ClearField("adaptation")
    wanted.base_model, wanted.start_from = "", sft.tuned_model
    if full:
        wanted.full.CopyFrom(FullConfig())
    return judge, await ended(site, "whole", wanted), await ended(site, "broken", wanted)


def assert_values(drawn: Sequence[Rollout], folder: Path, base: Path, *, full: bool) -> None:
    """Compare rewards with what transformers makes of the same tokens."""
    assert {one.WhichOneof("outcome") for one in drawn} == {"reward"}
    # transformers takes the last token that is no padding.
    shown = [one for one in drawn if given(one)[-1] != PADDING]
    theirs = scored_by_transformers(folder, base, [given(one) for one in shown], full=full)
    assert len(shown) > 80
    assert any(one.finish_reason == FINISH_REASON_STOP for one in shown)
    assert [one.reward for one in shown] == pytest.approx(theirs, rel=0.05, abs=0.1)  # ours is of bfloat16


async def test_a_reward_model_is_a_part_of_a_multi_grader_and_stays_while_the_job_runs(
    prompts: Site, model_folder: Path, token_rows: Callable[..., list[Any]]
) -> None:
    grader = Grader(
        multi=MultiGrader(
            graders={"judge": JUDGE, "twice": JUDGE, "low": LOW},
            calculate_output="judge - twice + low",
        )
    )
    async with prompts.worker():
        await registered(prompts, model_folder, token_rows)
        await ended(prompts, "judge", judging())
    queued = await prompts.create_job("one", reinforcement(grader, steers={"max_steps": 1}))
    name = JUDGE.reward_model.model
    delete = model_service_pb2.DeleteModelRequest(name=name)
    with pytest.raises(Exception, match=f"is needed by {queued.name}, until"):
        await prompts.models.DeleteModel(delete, metadata=prompts.metadata)
    async with prompts.worker():
        job = await prompts.ended(queued.name)
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    drawn = await rollouts_of(prompts, job, 1)
    assert {one.reward for one in drawn} <= {0.0, 1.0}
    assert [one.reward for one in drawn] == [one.part_scores["low"] for one in drawn]
    assert all(one.part_scores["judge"] == one.part_scores["twice"] for one in drawn)
    assert len({one.part_scores["judge"] for one in drawn}) > 10
    await prompts.models.DeleteModel(delete, metadata=prompts.metadata)


async def test_values_that_are_no_numbers_are_errors_and_too_many_fail_the_job(
    prompts: Site,
    model_folder: Path,
    token_rows: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = Valuer.values

    def broken(self: Valuer, *words: Any) -> list[float]:
        return [math.nan if number % 6 == 0 else value for number, value in enumerate(values(self, *words))]

    monkeypatch.setattr(Valuer, "values", broken)
    async with prompts.worker():
        await registered(prompts, model_folder, token_rows)
        prompts.data.others[PAIRS].chat_template = "{{ messages }}"
        await ended(prompts, "judge", judging())
        few = await ended(prompts, "few", reinforcement(JUDGE, steers={"max_steps": 1}))
        many = await failed(prompts, "many", reinforcement(JUDGE, max_grader_errors=8))
        logs = [event.log async for event in prompts.watch(few.name) if event.HasField("log")]
    (metrics,) = await prompts.metrics(few.name)
    assert metrics["num_grader_errors"] == 8
    assert math.isfinite(metrics["reward_mean"])
    drawn = await rollouts_of(prompts, few, 1)
    assert [one.HasField("error") for one in drawn] == [number % 6 == 0 for number in range(48)]
    assert (reason_of(many), many.num_attempts) == (Reason.SCORE_NOT_FINITE, 1)
    name = JUDGE.reward_model.model
    assert f"grader judge: the value that {name} gives must be finite, got nan" in many.error.message
    told = [one.text for one in logs if "another chat template" in one.text]
    assert told == [
        f"the reward model {name} was taught by another chat template, or other dates in it, than wrote the prompts of "
        f"{few.rendering}: it values conversations as it has not seen them written"
    ]


@pytest.mark.parametrize(("longest", "fits"), [(253, True), (254, False)])
def test_a_reward_model_must_have_room_for_the_end_that_it_was_taught(
    tiny_llama: Callable[..., PreTrainedModel], longest: int, fits: bool
) -> None:
    valuer = Valuer(model=tiny_llama(), head=torch.zeros(1, 32))
    judge = Judge(
        loaded=LoadedRewardModel(name="judge", valuer=valuer, taught=Taught()),
        ends=AnswerEnds(conversation=AnswerEnd(token_ids=(2, 9, 9, 9)), text=AnswerEnd(token_ids=(2,))),
        stop_token_ids=frozenset({2}),
        micro_batch_tokens=64,
    )
    if fits:
        judge.require_room(longest)
        return
    with pytest.raises(FailedPrecondition) as caught:
        judge.require_room(longest)
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert "must have at most its 256 tokens, they may have 257" in caught.value.message
