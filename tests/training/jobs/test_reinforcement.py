"""Reinforcement jobs: defaults, what is refused and why, and what their plan says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tests.training.conftest import stored
from tests.training.jobs.rollouts import GRADER, create, reinforcement
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.training.recipes.batches import RowLength
from luthier.v1.fine_tuning_job_pb2 import (
    FineTuningPlan,
    Hyperparameters,
    LoraConfig,
    ReinforcementConfig,
    Selection,
)
from luthier.v1.grader_pb2 import Grader, MultiGrader, RegexGrader, RemoteGrader
from luthier.v1.rendering_pb2 import RENDERING_KIND_PROMPT, Rendering

JOB = "projects/default/fineTuningJobs/one"


def prompts(*lengths: int, first: int = 0) -> tuple[RowLength, ...]:
    return tuple(
        RowLength(row=row, num_tokens=length, num_supervised=0)
        for row, length in enumerate(lengths, start=first)
    )


def know(bench: Any, train: tuple[RowLength, ...], validation: tuple[RowLength, ...] = ()) -> None:
    """Know a rendering of these prompts; nothing is to be learnt from their own tokens, so none of them is idle."""
    rendering = Rendering(
        name=bench.RENDERING,
        state=Rendering.STATE_READY,
        digest="r" * 64,
        tokenizer_digest="t" * 64,
        kind=RENDERING_KIND_PROMPT,
    )
    bench.know(rendering, train, validation)
    for split in bench.renderings.views[bench.RENDERING].split_statistics:
        split.num_unsupervised = 0
        split.num_units = split.tokens.count
        split.longest_unit_tokens = split.tokens.maximum


async def plan(bench: Any, method: Mapping[str, Any] | None = None, **hyperparameters: Any) -> FineTuningPlan:
    made: FineTuningPlan = await bench.plan(
        reinforcement=reinforcement(**method or {}), hyperparameters=Hyperparameters(**hyperparameters)
    )
    return made


async def test_all_that_is_not_said_is_filled_in(bench: Any) -> None:
    know(bench, prompts(5, 6))
    job = (await bench.plan(reinforcement=ReinforcementConfig(grader=GRADER, max_new_tokens=9))).resolved_job
    assert job.reinforcement == ReinforcementConfig(
        grader=GRADER,
        num_samples=8,
        max_new_tokens=9,
        temperature=1.0,
        top_p=1.0,
        clip_low=0.2,
        clip_high=0.28,
        normaliser=ReinforcementConfig.NORMALISER_TOKENS,
        max_grader_errors=64,
    )
    assert (job.hyperparameters.batch_rows, job.hyperparameters.HasField("batch_tokens")) == (16, False)
    assert job.hyperparameters.learning_rate == 1e-5
    know(bench, prompts(5), prompts(5, first=1))
    wanted = {"reinforcement": reinforcement(), "selection": Selection(patience=1)}
    chosen = (await bench.plan(**wanted)).resolved_job.selection
    assert (chosen.metric, chosen.direction) == ("validation_reward", Selection.DIRECTION_HIGHER)


async def test_what_is_said_stays(bench: Any) -> None:
    know(bench, prompts(5, 6))
    said = reinforcement(
        num_samples=4,
        temperature=0.7,
        top_p=1.0,
        clip_low=0.1,
        clip_high=0.4,
        kl_weight=0.05,
        drop_truncated=True,
        normaliser=ReinforcementConfig.NORMALISER_CONSTANT,
        scale_by_spread=True,
        max_grader_errors=3,
    )
    job = (await bench.plan(reinforcement=said, hyperparameters=Hyperparameters(batch_rows=2))).resolved_job
    assert job.reinforcement == said
    assert job.hyperparameters.batch_rows == 2


@pytest.mark.parametrize(
    ("method", "reason", "message"),
    [
        (
            {"num_samples": 1},
            Reason.GROUP_TOO_SMALL,
            "num_samples: must be at least 2: the answer of a group of one has nothing to be compared with, its "
            "advantage is 0, got 1",
        ),
        ({"num_samples": -1}, Reason.INVALID_FIELD, "num_samples: must be in 1..64, got -1"),
        ({"num_samples": 65}, Reason.INVALID_FIELD, "num_samples: must be in 1..64, got 65"),
        (
            {"top_p": 0.9},
            Reason.SAMPLING_BIASED,
            "top_p: must be 1: of answers drawn from a part of the probabilities, ratios to the sampler are biased, "
            "got 0.9",
        ),
        ({"top_p": 1.5}, Reason.INVALID_FIELD, "top_p: must be above 0 and at most 1, got 1.5"),
        ({"grader": None}, Reason.FIELD_REQUIRED, "grader: must be a grader, got nothing"),
        ({"grader": Grader()}, Reason.INVALID_FIELD, "grader: must be one of string_check, "),
        (
            {"grader": Grader(regex=RegexGrader(input="{{sample.output}}", pattern="a"))},
            Reason.INVALID_FIELD,
            "grader.regex.input: sample has output_text, which is text, and output_json, got",
        ),
        (
            {"grader": Grader(regex=RegexGrader(input="{{item.a}}", pattern="a"))},
            Reason.INVALID_FIELD,
            "grader: must read the answer, as {{sample.output_text}} does",
        ),
        ({"max_new_tokens": 32_769}, Reason.INVALID_FIELD, "max_new_tokens: must be in 1..32768, got 32769"),
        ({"temperature": 2.5}, Reason.INVALID_FIELD, "temperature: must be above 0 and at most 2, got 2.5"),
        ({"temperature": -1.0}, Reason.INVALID_FIELD, "temperature: must be above 0 and at most 2, got -1.0"),
        ({"clip_low": 1.0}, Reason.INVALID_FIELD, "clip_low: must be above 0 and below 1, got 1.0"),
        ({"clip_high": -0.1}, Reason.INVALID_FIELD, "clip_high: must be above 0 and at most 1e+06, got -0.1"),
        ({"kl_weight": float("nan")}, Reason.INVALID_FIELD, "kl_weight: must be in 0..1e+06, got nan"),
        ({"max_grader_errors": -1}, Reason.INVALID_FIELD, "max_grader_errors: must be in 1..1000000, got -1"),
    ],
)
async def test_what_a_knob_may_not_be_is_refused_with_its_reason(
    bench: Any, method: dict[str, Any], reason: Reason, message: str
) -> None:
    know(bench, prompts(5, 6))
    for refused in (plan(bench, method), bench.create("one", reinforcement=reinforcement(**method))):
        with pytest.raises(InvalidArgument) as caught:
            await refused
        (violation,) = caught.value.violations
        assert violation.reason == caught.value.reason == reason
        assert f"{violation.field}: {violation.description}".startswith(
            f"fine_tuning_job.reinforcement.{message}"
        )


async def test_all_that_is_wrong_is_named_at_once(bench: Any) -> None:
    know(bench, prompts(5, 6))
    with pytest.raises(InvalidArgument) as caught:
        await bench.plan(
            reinforcement=reinforcement(num_samples=1, top_p=0.5, grader=Grader()),
            hyperparameters=Hyperparameters(batch_tokens=64),
            checkpoint_interval_steps=1001,
        )
    assert {one.field.removeprefix("fine_tuning_job."): one.reason for one in caught.value.violations} == {
        "reinforcement.num_samples": Reason.GROUP_TOO_SMALL,
        "reinforcement.top_p": Reason.SAMPLING_BIASED,
        "reinforcement.grader": Reason.INVALID_FIELD,
        "hyperparameters.batch_tokens": Reason.INVALID_FIELD,
        "checkpoint_interval_steps": Reason.INVALID_FIELD,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hyperparameters": Hyperparameters(batch_tokens=64)},
            "hyperparameters.batch_tokens: must be unset with reinforcement, as it is not known how long answers will "
            "be; set batch_rows, the prompts of a step, got 64",
        ),
        (
            {"lora": LoraConfig(dropout=0.5)},
            "lora.dropout: must be 0 with reinforcement, as answers are drawn without dropout: what is learnt would be "
            "another model's, got 0.5",
        ),
        (
            {"hyperparameters": Hyperparameters(batch_rows=2049)},
            "hyperparameters.batch_rows: must be at most 2048 with num_samples 8, as a step may draw 16384 answers, "
            "got 2049",
        ),
        (
            {"checkpoint_interval_steps": 1001},
            "checkpoint_interval_steps: must be at most 1000 with reinforcement",
        ),
        (
            {"selection": Selection(metric="validation_loss")},
            "selection.metric: must be one of validation_answer_tokens, validation_reward, "
            "validation_truncated_share, got 'validation_loss'",
        ),
    ],
)
async def test_what_does_not_go_with_reinforcement_is_refused_by_field(
    bench: Any, changes: dict[str, Any], message: str
) -> None:
    know(bench, prompts(5, 6))
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("one", reinforcement=reinforcement(), **changes)
    assert f"fine_tuning_job.{message}" in caught.value.message


async def test_a_reward_service_must_be_one_that_may_be_called(bench: Any) -> None:
    know(bench, prompts(5, 6))
    allowed = Grader(remote=RemoteGrader(address="127.0.0.1:5001"))
    await plan(bench, {"grader": allowed})
    other = Grader(remote=RemoteGrader(address="10.0.0.1:5001"))
    inner = Grader(multi=MultiGrader(graders={"a": allowed, "b": other}, calculate_output="a + b"))
    for grader, field in ((other, "grader"), (inner, "grader.multi.graders['b']")):
        with pytest.raises(InvalidArgument) as caught:
            await plan(bench, {"grader": grader})
        (violation,) = caught.value.violations
        assert violation.reason == Reason.ADDRESS_NOT_ALLOWED
        assert violation.field == f"fine_tuning_job.reinforcement.{field}.remote.address"
        assert violation.description == (
            "must be host:port of 127.0.0.1, [::1]:7, which LUTHIER_REWARD_ADDRESSES allows, got '10.0.0.1:5001'"
        )


async def test_a_plan_counts_prompts_and_the_longest_answers(bench: Any) -> None:
    know(bench, prompts(5, 6, 7, 8, 9), prompts(5, 5, first=5))
    made = await plan(bench, {"num_samples": 3, "max_new_tokens": 10}, batch_rows=2, num_epochs=2)
    assert (made.num_train_rows, made.num_validation_rows) == (5, 2)
    assert (made.num_steps, made.num_steps_per_epoch) == (6, 3)
    assert made.num_tokens == 2 * 3 * (35 + 5 * 10)
    assert made.num_supervised_tokens == 2 * 3 * 5 * 10
    assert (made.packing_efficiency, made.num_unsupervised) == (1.0, 0)
    assert (await plan(bench, batch_rows=2, num_epochs=2, max_steps=4)).num_steps == 4


async def test_a_plan_without_validation_prompts_says_what_is_not_measured(bench: Any) -> None:
    know(bench, prompts(5, 6))
    assert list((await plan(bench)).warnings) == [
        "there are no validation rows, so validation_reward is not measured"
    ]


async def test_the_longest_prompt_and_its_answer_fit_a_forward_pass(bench: Any) -> None:
    know(bench, prompts(5, 20))
    await plan(bench, {"max_new_tokens": 12}, micro_batch_tokens=32)
    for refused in (
        plan(bench, {"max_new_tokens": 13}, micro_batch_tokens=32),
        bench.create(
            "one",
            reinforcement=reinforcement(max_new_tokens=13),
            hyperparameters=Hyperparameters(micro_batch_tokens=32),
        ),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await refused
        assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
        said = caught.value.message.replace(" (row 1) of 20", " of 20").removesuffix(
            "; the longest is songs.jsonl:2"
        )
        assert said == (
            "hyperparameters.micro_batch_tokens must be at least 33, the longest prompt of 20 and max_new_tokens, "
            "got 32"
        )


@pytest.mark.parametrize(
    ("longest", "max_new_tokens", "advice"),
    [
        (20, 45, "; set max_new_tokens to 44 or less, or create the rendering with a smaller max_tokens"),
        (64, 1, "; create the rendering with a smaller max_tokens"),
    ],
)
async def test_the_longest_prompt_and_its_answer_fit_the_model(
    bench: Any, longest: int, max_new_tokens: int, advice: str
) -> None:
    know(bench, prompts(5, longest))
    with pytest.raises(FailedPrecondition) as caught:
        await plan(bench, {"max_new_tokens": max_new_tokens})
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.message == (
        "prompts and their answers must have at most the base model's 64 tokens, the longest prompt (row 1) has "
        f"{longest} and its answer may have {max_new_tokens}{advice}; the longest is songs.jsonl:2"
    )


async def test_of_a_job_that_is_not_judged_the_best_rewarded_checkpoint_is_kept(bench: Any) -> None:
    await create(bench, max_checkpoints=1)
    task, _ = await bench.claim()
    for step, reward in ((1, 0.2), (2, 0.7), (3, 0.5), (4, None)):
        metrics = {"train_reward": 0.9} if reward is None else {"validation_reward": reward}
        file = await stored(bench, f"step {step}")
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, [file], metrics))
    uid = (await bench.job(JOB)).uid
    assert [point.step for point in await bench.jobs.checkpoints(uid, 0, 9)] == [2, 4]
