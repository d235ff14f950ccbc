"""Jobs that mix renderings: which shares add up, whose rows may meet, what is held, and what a plan says of each."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import adapter_files, lengths_of

from luthier.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, Reason
from luthier.training.jobs import planning
from luthier.v1.dataset_pb2 import SPLIT_TRAIN
from luthier.v1.fine_tuning_job_pb2 import (
    FineTuningJob,
    Hyperparameters,
    PreferenceConfig,
    ReinforcementConfig,
    RenderingShare,
    RewardModelConfig,
    Selection,
)
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_UNPAIRED,
    Rendering,
    RenderingSplitStatistics,
)
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"
OWN = "projects/default/renderings/songs"
GENERAL = "projects/default/renderings/general"
CODE = "projects/default/renderings/code"
FIELD = "fine_tuning_job.mixed_renderings"
Loss = PreferenceConfig.Loss


def mix(**shares: float) -> dict[str, Any]:
    return {
        "mixed_renderings": [
            RenderingShare(rendering=f"projects/default/renderings/{name}", share=share)
            for name, share in shares.items()
        ]
    }


def know(bench: Any, name: str, count: int = 20, num_tokens: int = 10, **changes: Any) -> Rendering:
    """Know a READY rendering of so many training rows, and 5 of validation."""
    known = {"name": name, "state": Rendering.STATE_READY, "digest": "g" * 64, "tokenizer_digest": "t" * 64}
    validation = lengths_of(5, num_tokens, first=count)
    bench.know(Rendering(**{**known, **changes}), lengths_of(count, num_tokens), validation)
    found: Rendering = bench.renderings.views[name]
    return found


@pytest.fixture
def mixed(bench: Any) -> Any:
    """The bench, with two more renderings."""
    know(bench, GENERAL, uid="6f0a1f0e-0000-4000-8000-000000000001")
    know(bench, CODE, 40, digest="c" * 64, uid="6f0a1f0e-0000-4000-8000-000000000002")
    return bench


async def refused(bench: Any, **changes: Any) -> LuthierError:
    with pytest.raises(LuthierError) as caught:
        await bench.create("one", **changes)
    with pytest.raises(NotFound):
        await bench.job(JOB)
    return caught.value


@pytest.mark.parametrize(
    ("own", "shares", "message"),
    [
        (
            0,
            {"general": 0.5, "code": 0.75},
            "shares must add up to less than 1, as the rest is that of the job's own rendering, got 1.25 (0.5 + 0.75)",
        ),
        (
            0,
            {"general": 0.5, "code": 0.5},
            "shares must add up to less than 1, as the rest is that of the job's own rendering, got 1 (0.5 + 0.5)",
        ),
        (
            0.5,
            {"general": 0.25, "code": 0.2},
            "shares must add up to 1, rendering_share with them, got 0.95 (0.5 + 0.25 + 0.2)",
        ),
        (
            0.9,
            {"general": 0.2},
            "shares must add up to 1, rendering_share with them, got 1.1 (0.9 + 0.2)",
        ),
    ],
)
async def test_shares_that_do_not_add_up_are_refused_with_their_sum(
    mixed: Any, own: float, shares: dict[str, float], message: str
) -> None:
    error = await refused(mixed, rendering_share=own, **mix(**shares))
    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.message) == (Reason.SHARES_DO_NOT_ADD_UP, f"{FIELD}: {message}")


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (mix(general=0), f"{FIELD}[0].share", "must be above 0 and below 1, got 0.0"),
        (mix(general=0.2, code=1), f"{FIELD}[1].share", "must be above 0 and below 1, got 1.0"),
        (mix(general=-0.2), f"{FIELD}[0].share", "must be above 0 and below 1, got -0.2"),
        (
            mix(songs=0.2),
            f"{FIELD}[0].rendering",
            f"must be another rendering, {OWN} is the job's own",
        ),
        (
            {"mixed_renderings": [RenderingShare(rendering=GENERAL, share=0.1)] * 2},
            f"{FIELD}[1].rendering",
            f"must be another rendering, {GENERAL} is mixed in already",
        ),
        (
            {"rendering_share": 0.5},
            "fine_tuning_job.rendering_share",
            "must be unset without mixed_renderings: the rendering is all that is learnt",
        ),
        (
            {
                "mixed_renderings": [
                    RenderingShare(rendering=f"{GENERAL}-{number}", share=0.1) for number in range(9)
                ]
            },
            FIELD,
            "must hold at most 8 renderings, got 9",
        ),
    ],
)
async def test_what_is_no_mixture_is_refused_by_its_field(
    mixed: Any, changes: dict[str, Any], field: str, message: str
) -> None:
    error = await refused(mixed, **changes)
    assert isinstance(error, InvalidArgument)
    assert (field, message) in [(one.field, one.description) for one in error.violations]


@pytest.mark.parametrize(
    ("name", "reason", "message"),
    [
        ("", Reason.FIELD_REQUIRED, f"{FIELD}[0].rendering: must be projects/"),
        ("general", Reason.INVALID_FIELD, f"{FIELD}[0].rendering: must be projects/"),
        (
            "projects/default/renderings/unknown",
            Reason.RESOURCE_NOT_FOUND,
            "renderings/unknown does not exist",
        ),
    ],
)
async def test_a_mixed_rendering_must_be_there(mixed: Any, name: str, reason: Reason, message: str) -> None:
    error = await refused(mixed, mixed_renderings=[RenderingShare(rendering=name, share=0.2)])
    assert error.reason == reason
    assert message in error.message


@pytest.mark.parametrize(
    ("changes", "reason", "message"),
    [
        (
            {"kind": RENDERING_KIND_PREFERENCE},
            Reason.RENDERING_KIND_MISMATCH,
            f"{GENERAL} must be of kind SUPERVISED",
        ),
        ({"tokenizer_digest": "x" * 64}, Reason.WRONG_STATE, f"{GENERAL} must be made with the tokenizer of"),
        (
            {"state": Rendering.STATE_RENDERING},
            Reason.WRONG_STATE,
            f"{GENERAL} must be READY, it is RENDERING",
        ),
    ],
)
async def test_a_mixed_rendering_must_fit_as_the_jobs_own_does(
    mixed: Any, changes: dict[str, Any], reason: Reason, message: str
) -> None:
    know(mixed, GENERAL, **changes)
    error = await refused(mixed, **mix(general=0.2))
    assert isinstance(error, FailedPrecondition)
    assert error.reason == reason
    assert error.message.startswith(message)


async def test_a_mixed_rendering_that_teaches_nothing_or_is_too_long_is_refused_by_its_name(
    mixed: Any,
) -> None:
    know(mixed, GENERAL, 0)
    error = await refused(mixed, **mix(general=0.2))
    assert error.reason == Reason.NO_SUPERVISED_TOKENS
    assert error.message.startswith(f"{GENERAL} must have training rows")
    know(mixed, GENERAL, 20, 70)
    error = await refused(mixed, **mix(general=0.2))
    assert error.reason == Reason.SEQUENCE_TOO_LONG
    assert f"tokens, the longest row of {GENERAL} has 70" in error.message
    know(mixed, GENERAL, 20, 30)
    error = await refused(mixed, hyperparameters=Hyperparameters(micro_batch_tokens=20), **mix(general=0.2))
    assert f"micro_batch_tokens must be at least 30, the longest row of {GENERAL}, got 20" in error.message


async def test_a_share_that_asks_for_more_rows_than_can_be_counted_is_refused(
    mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MAX_PASSED_ROWS", 100)
    error = await refused(mixed, **mix(general=0.9))
    assert error.message == (
        f"{FIELD}: must take at most 100 rows an epoch, 200 are asked for, as {OWN} has a share of 0.1; give it a "
        "larger one"
    )
    error = await refused(mixed, hyperparameters=Hyperparameters(num_epochs=3), **mix(general=0.5))
    assert "num_epochs: must be at most 2 for 40 training rows, got 3" in error.message


async def test_the_jobs_own_rendering_has_the_rest_and_a_resolved_job_is_taken_again(mixed: Any) -> None:
    job = await mixed.create("one", **mix(general=0.2, code=0.05))
    assert job.rendering_share == pytest.approx(0.75)
    again = FineTuningJob()
    again.CopyFrom(job)
    for name in (
        "name",
        "uid",
        "state",
        "tuned_model_id",
        "references",
        "create_time",
        "update_time",
        "etag",
    ):
        again.ClearField(name)
    await mixed.jobs.check(again)
    thirds = mix(general=0.333, code=0.334)
    assert (await mixed.create("two", rendering_share=0.333, **thirds)).rendering_share == 0.333


async def test_mixed_renderings_are_pinned_referenced_held_and_given_to_the_worker(mixed: Any) -> None:
    job = await mixed.create("one", **mix(general=0.2, code=0.3))
    told = {one.name: (one.uid, one.digest) for one in job.references}
    assert told[GENERAL] == ("6f0a1f0e-0000-4000-8000-000000000001", "g" * 64)
    assert told[CODE] == ("6f0a1f0e-0000-4000-8000-000000000002", "c" * 64)
    private = (await mixed.jobs.family.read(JOB)).private
    assert (private.rendering_digest, list(private.mixed_rendering_digests)) == (
        "r" * 64,
        ["g" * 64, "c" * 64],
    )
    assert mixed.keeper.holders() == [(CODE, JOB), (GENERAL, JOB), (OWN, JOB)]
    task, spec = await mixed.claim()
    assert task.resources == (OWN, GENERAL, CODE)
    assert list(spec.train.mixed_rendering_digests) == ["g" * 64, "c" * 64]
    assert [one.rendering for one in spec.train.job.mixed_renderings] == [GENERAL, CODE]
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(step=1, files=await adapter_files(mixed)))
    await mixed.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    model = await mixed.model((await mixed.job(JOB)).tuned_model)
    assert {OWN, GENERAL, CODE} <= {one.name for one in model.references}
    assert model.taught.rendering == OWN
    await mixed.elsewhere.sweep()
    assert mixed.keeper.holders() == []


async def test_a_plan_counts_each_rendering_by_itself(mixed: Any) -> None:
    plan = await mixed.plan(
        hyperparameters=Hyperparameters(num_epochs=2, batch_rows=10), **mix(general=0.2, code=0.3)
    )
    own, general, code = plan.renderings
    assert [one.rendering for one in plan.renderings] == [OWN, GENERAL, CODE]
    assert [one.digest for one in plan.renderings] == ["r" * 64, "g" * 64, "c" * 64]
    # 20 rows are half of all that is learnt, twice.
    assert [one.num_rows for one in plan.renderings] == [40, 16, 24]
    assert [one.num_supervised_tokens for one in plan.renderings] == [200, 80, 120]
    assert [one.num_tokens for one in plan.renderings] == [400, 160, 240]
    assert [one.reached_share for one in plan.renderings] == pytest.approx([0.5, 0.2, 0.3])
    assert [one.share for one in plan.renderings] == pytest.approx([0.5, 0.2, 0.3])
    assert [one.num_epochs for one in plan.renderings] == pytest.approx([2.0, 0.8, 0.6])
    assert (own.num_train_rows, general.num_train_rows, code.num_train_rows) == (20, 20, 40)
    assert [one.num_validation_rows for one in plan.renderings] == [5, 5, 5]
    assert (plan.num_train_rows, plan.num_validation_rows) == (20, 5)
    assert (plan.num_tokens, plan.num_supervised_tokens) == (800, 400)
    assert (plan.num_steps, plan.num_steps_per_epoch) == (8, 4)
    assert not plan.warnings


async def test_prompts_of_reinforcement_are_not_mixed(mixed: Any) -> None:
    error = await refused(mixed, reinforcement=ReinforcementConfig(), **mix(general=0.2))
    assert isinstance(error, InvalidArgument)
    assert (FIELD, "must be unset with reinforcement, whose prompts are of one rendering") in [
        (one.field, one.description) for one in error.violations
    ]


async def test_without_a_mixture_a_plan_has_no_renderings(mixed: Any) -> None:
    plan = await mixed.plan()
    assert not plan.renderings
    assert plan.resolved_job.rendering_share == 0


@pytest.mark.parametrize("method", ["preference", "kto", "reward_model"])
async def test_shares_of_pairs_and_answers_are_of_units(mixed: Any, method: str) -> None:
    """Rows of the second rendering have twice as many learnt tokens, and count no more for it."""
    kto = PreferenceConfig(loss=Loss.LOSS_KTO)
    chosen = {"preference": PreferenceConfig(), "kto": kto, "reward_model": RewardModelConfig()}[method]
    kind = RENDERING_KIND_UNPAIRED if method == "kto" else RENDERING_KIND_PREFERENCE
    know(mixed, OWN, 20, 10, kind=kind)
    know(mixed, GENERAL, 20, 20, kind=kind)
    steers = Hyperparameters(batch_rows=5)
    field = "reward_model" if method == "reward_model" else "preference"
    plan = await mixed.plan(hyperparameters=steers, **{field: chosen}, **mix(general=0.2))
    assert [one.num_rows for one in plan.renderings] == [20, 5]
    assert plan.renderings[1].reached_share == pytest.approx(0.2)


async def test_rows_that_come_again_within_an_epoch_are_a_warning(mixed: Any) -> None:
    know(mixed, GENERAL, 4)
    plan = await mixed.plan(**mix(general=0.5))
    assert plan.warnings[0] == (
        f"rows of {GENERAL} are seen 5 times an epoch, as its share of 0.5 asks for more than it has; a smaller share "
        "or more rows of it repeat less"
    )
    assert plan.renderings[1].num_epochs == 5


async def test_a_share_that_is_not_reached_is_a_warning(mixed: Any) -> None:
    know(mixed, GENERAL, 4, 60)
    plan = await mixed.plan(**mix(general=0.02))
    assert plan.renderings[1].num_rows == 0
    assert any(
        one.startswith(f"the share of {GENERAL} comes to 0, 0.02 was asked: its rows")
        for one in plan.warnings
    )


async def test_a_step_without_a_row_of_the_jobs_own_is_told_of(mixed: Any) -> None:
    plan = await mixed.plan(hyperparameters=Hyperparameters(batch_rows=1, max_steps=1), **mix(general=0.9))
    assert [one.num_rows for one in plan.renderings] == [0, 1]
    assert any(one.startswith(f"the share of {OWN} comes to 0, 0.1 was asked") for one in plan.warnings)


async def test_warnings_of_several_renderings_say_of_which_they_are(mixed: Any) -> None:
    train = RenderingSplitStatistics(split=SPLIT_TRAIN, num_truncated=7)
    know(
        mixed,
        GENERAL,
        split_statistics=[train],
        warnings=["a finding"],
        effective_chat_template="{{ other }}",
    )
    mixed.know(mixed.renderings.views[CODE], lengths_of(40, 10), ())
    plan = await mixed.plan(hyperparameters=Hyperparameters(batch_rows=10), **mix(general=0.3, code=0.3))
    assert list(plan.warnings) == [
        f"{GENERAL}: 7 training records are cut at max_tokens of the rendering",
        f"{CODE}: there are no validation rows, so validation_loss_2 is not measured",
        f"{GENERAL} was rendered with another chat template than {OWN}, whose template the tuned model is asked with; "
        "create it anew with the same one unless this is meant",
        f"{GENERAL}: a finding",
    ]


async def test_a_job_may_be_judged_by_what_is_measured_on_a_mixed_rendering(mixed: Any) -> None:
    job = await mixed.create(
        "one", selection=Selection(metric="validation_token_accuracy_1"), **mix(general=0.2)
    )
    assert job.selection.direction == Selection.DIRECTION_HIGHER
    for metric in ("validation_loss_2", "validation_loss_0", "validation_loss_01"):
        with pytest.raises(InvalidArgument, match="with _1 behind it for a mixed rendering, got"):
            await mixed.create("two", selection=Selection(metric=metric), **mix(general=0.2))
    with pytest.raises(
        InvalidArgument, match=r"must be one of validation_loss, validation_token_accuracy, got"
    ):
        await mixed.create("two", selection=Selection(metric="validation_loss_1"))
    mixed.know(mixed.renderings.views[GENERAL], lengths_of(20, 10), ())
    await mixed.create("two", selection=Selection(), **mix(general=0.2))
    with pytest.raises(FailedPrecondition, match=f"{GENERAL} must have validation rows that teach") as caught:
        await mixed.create("three", selection=Selection(metric="validation_loss_1"), **mix(general=0.2))
    assert caught.value.reason == Reason.METRIC_NOT_MEASURED
