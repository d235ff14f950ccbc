"""How jobs are trained: defaults of each method, what goes with what, which rendering it learns from, what is best."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import adapter_files, stored
from tests.training.jobs.rollouts import reinforcement
from tests.training.jobs.test_starts import full_files
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, InvalidArgument, Reason
from luthier.training.names import is_checkpoint
from luthier.training.recipes.batches import RowLength
from luthier.v1.dataset_pb2 import SPLIT_TRAIN, SPLIT_VALIDATION
from luthier.v1.fine_tuning_job_pb2 import (
    LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY,
    FineTuningJob,
    FullConfig,
    Hyperparameters,
    PreferenceConfig,
    RewardModelConfig,
    Selection,
    SupervisedConfig,
)
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import (
    RENDERING_KIND_PREFERENCE,
    RENDERING_KIND_PROMPT,
    RENDERING_KIND_SUPERVISED,
    RENDERING_KIND_UNPAIRED,
    LengthStatistics,
    RenderingKind,
    RenderingRoleStatistics,
    RenderingSplitStatistics,
)
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"
Loss = PreferenceConfig.Loss
DPO = {"preference": PreferenceConfig()}
KTO = {"preference": PreferenceConfig(loss=Loss.LOSS_KTO)}
REWARD = {"reward_model": RewardModelConfig()}
REINFORCEMENT = {"reinforcement": reinforcement()}
KINDS = [RENDERING_KIND_SUPERVISED, RENDERING_KIND_PREFERENCE, RENDERING_KIND_UNPAIRED, RENDERING_KIND_PROMPT]


@pytest.mark.parametrize(
    ("method", "filled"),
    [
        ({"loss": Loss.LOSS_UNSPECIFIED}, {"loss": Loss.LOSS_DPO, "beta": 0.1}),
        ({"loss": Loss.LOSS_IPO, "nll_weight": 0.5}, {"loss": Loss.LOSS_IPO, "beta": 0.1, "nll_weight": 0.5}),
        ({"loss": Loss.LOSS_ORPO, "beta": 0.3}, {"loss": Loss.LOSS_ORPO, "beta": 0.3}),
        ({"loss": Loss.LOSS_SIMPO}, {"loss": Loss.LOSS_SIMPO, "beta": 2.0, "gamma": 1.0}),
        ({"loss": Loss.LOSS_SIMPO, "gamma": 0}, {"loss": Loss.LOSS_SIMPO, "beta": 2.0, "gamma": 0}),
        (
            {"loss": Loss.LOSS_KTO, "desirable_weight": 2},
            {"loss": Loss.LOSS_KTO, "beta": 0.1, "desirable_weight": 2, "undesirable_weight": 1},
        ),
    ],
)
async def test_each_loss_has_its_defaults(bench: Any, method: dict[str, Any], filled: dict[str, Any]) -> None:
    is_kto = method["loss"] == Loss.LOSS_KTO
    bench.add_rendering(kind=RENDERING_KIND_UNPAIRED if is_kto else RENDERING_KIND_PREFERENCE)
    job = (await bench.plan(preference=PreferenceConfig(**method))).resolved_job
    assert job.preference == PreferenceConfig(**filled)


@pytest.mark.parametrize(
    ("method", "kind", "rates"),
    [
        ({}, RENDERING_KIND_SUPERVISED, (2e-4, 2e-5)),
        ({"supervised": SupervisedConfig()}, RENDERING_KIND_SUPERVISED, (2e-4, 2e-5)),
        (DPO, RENDERING_KIND_PREFERENCE, (2e-5, 1e-6)),
        (KTO, RENDERING_KIND_UNPAIRED, (2e-5, 1e-6)),
        (REWARD, RENDERING_KIND_PREFERENCE, (1e-4, 1e-5)),
        (REINFORCEMENT, RENDERING_KIND_PROMPT, (1e-5, 1e-6)),
    ],
)
async def test_each_method_has_its_rates_and_learns_from_one_kind_of_rendering(
    bench: Any, method: dict[str, Any], kind: RenderingKind.ValueType, rates: tuple[float, float]
) -> None:
    for one in KINDS:
        version = "projects/default/datasets/d/versions/v"
        bench.add_rendering(kind=one, dataset_version=version)
        if one == kind:
            jobs = [
                (await bench.plan(**method, **also)).resolved_job for also in ({}, {"full": FullConfig()})
            ]
            assert tuple(job.hyperparameters.learning_rate for job in jobs) == rates
            continue
        for refused in (bench.create("one", **method), bench.plan(**method)):
            with pytest.raises(FailedPrecondition) as caught:
                await refused
            assert caught.value.reason == Reason.RENDERING_KIND_MISMATCH
            wanted, found = (RenderingKind.Name(name).removeprefix("RENDERING_KIND_") for name in (kind, one))
            assert f"{bench.RENDERING} must be of kind {wanted}, from which a " in caught.value.message
            assert f"it is of kind {found}; create a rendering of {version}" in caught.value.message


async def test_a_job_of_a_rendering_of_before_kinds_is_supervised(bench: Any) -> None:
    assert (await bench.plan()).resolved_job.WhichOneof("method") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preference": PreferenceConfig(gamma=1)},
            "preference.gamma: must be unset with loss DPO: it belongs to SIMPO",
        ),
        (
            {"preference": PreferenceConfig(loss=Loss.LOSS_SIMPO, nll_weight=1)},
            "preference.nll_weight: must be unset with loss SIMPO: it belongs to DPO and IPO",
        ),
        (
            {"preference": PreferenceConfig(loss=Loss.LOSS_IPO, label_smoothing=0.1, desirable_weight=2)},
            "preference.label_smoothing: must be unset with loss IPO: it belongs to DPO; "
            "fine_tuning_job.preference.desirable_weight: must be unset with loss IPO: it belongs to KTO",
        ),
        (
            {"preference": PreferenceConfig(beta=0)},
            "preference.beta: must be above 0 and at most 1e+06, got 0.0",
        ),
        (
            {"preference": PreferenceConfig(label_smoothing=0.5)},
            "preference.label_smoothing: must be in [0, 0.5), got 0.5",
        ),
        (
            {"preference": PreferenceConfig(beta=float("nan"))},
            "preference.beta: must be above 0 and at most 1e+06, got nan",
        ),
        (
            {"reward_model": RewardModelConfig(margin=-1)},
            "reward_model.margin: must be in 0..1e+06, got -1.0",
        ),
        (
            {"selection": Selection(metric="validation_reward_margin")},
            "selection.metric: must be one of validation_loss, validation_token_accuracy, got "
            "'validation_reward_margin'",
        ),
        (
            {**KTO, "selection": Selection(metric="validation_logprob_chosen")},
            "selection.metric: must be one of validation_kl, validation_loss, validation_reward_accuracy, ",
        ),
        (
            {"selection": Selection(patience=-1)},
            "selection.patience: must be in 0..10000000, got -1",
        ),
        (
            {"hyperparameters": Hyperparameters(warmup_steps=3, warmup_ratio=0.1)},
            "hyperparameters.warmup_ratio: must be unset beside warmup_steps",
        ),
        (
            {"hyperparameters": Hyperparameters(warmup_ratio=1)},
            "hyperparameters.warmup_ratio: must be in [0, 1), got 1.0",
        ),
        (
            {"hyperparameters": Hyperparameters(decay_steps=3)},
            "hyperparameters.decay_steps: must be unset without learning_rate_schedule WARMUP_STABLE_DECAY",
        ),
        (
            {
                "hyperparameters": Hyperparameters(
                    learning_rate_schedule=LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY,
                    decay_steps=3,
                    decay_ratio=0.1,
                )
            },
            "hyperparameters.decay_ratio: must be unset beside decay_steps",
        ),
    ],
)
async def test_what_does_not_go_together_is_refused_by_field(
    bench: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.create("one", **changes)
    assert f"fine_tuning_job.{message}" in caught.value.message


async def test_a_falling_end_is_a_tenth_of_the_steps(bench: Any) -> None:
    stable = Hyperparameters(learning_rate_schedule=LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY)
    assert (await bench.plan(hyperparameters=stable)).resolved_job.hyperparameters.decay_ratio == 0.1
    stable.decay_steps = 3
    assert not (await bench.plan(hyperparameters=stable)).resolved_job.hyperparameters.HasField("decay_ratio")


async def test_a_job_that_is_judged_needs_validation_rows(bench: Any) -> None:
    known = bench.renderings.views[bench.RENDERING]
    bench.know(known, bench.renderings.rows[bench.RENDERING].train, ())
    with pytest.raises(FailedPrecondition, match="must have validation rows that teach") as caught:
        await bench.create("one", selection=Selection())
    assert caught.value.reason == Reason.METRIC_NOT_MEASURED


async def commit(bench: Any, task: Any, step: int, **metrics: float) -> None:
    files = [*await adapter_files(bench), await stored(bench, f"state {step}", "trainer_state.json")]
    files[1] = await stored(bench, f"factors {step}", "adapter_model.safetensors")
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, files, metrics))


@pytest.mark.parametrize(
    ("selection", "best"),
    [
        (Selection(use_best=True), 2),
        (Selection(use_best=True, min_delta=0.5), 1),
        (Selection(use_best=True, direction=Selection.DIRECTION_HIGHER), 5),
        (Selection(use_best=True, metric="validation_token_accuracy"), 3),
        (Selection(metric="validation_token_accuracy"), 3),
    ],
)
async def test_the_best_checkpoint_is_kept_and_becomes_the_model_where_that_is_asked_for(
    bench: Any, selection: Selection, best: int
) -> None:
    await bench.create("one", max_checkpoints=1, selection=selection)
    task, _ = await bench.claim()
    losses, accuracies = (1.0, 0.9, 0.95, 0.97, 1.2), (0.1, 0.2, 0.4, 0.4, 0.3)
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), start=1):
        await commit(bench, task, step, validation_loss=loss, validation_token_accuracy=accuracy)
    assert (await bench.job(JOB)).best_step == best
    uid = (await bench.jobs.family.read(JOB)).uid
    assert {one.step for one in await bench.jobs.checkpoints(uid, 0, 9)} == {best, 5}
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_files(bench), step=5))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    model = await bench.models.ready((await bench.job(JOB)).tuned_model)
    step = best if selection.use_best else 5
    assert model.message.step == step
    weights = bench.models.read_file(model, "adapter_model.safetensors", 0)
    wanted = b"factors" if step == 5 else b"factors %d" % step
    assert b"".join([piece async for piece in weights]) == wanted


async def test_a_checkpoint_that_was_not_validated_is_not_judged(bench: Any) -> None:
    await bench.create("one", selection=Selection())
    task, _ = await bench.claim()
    await commit(bench, task, 1, train_loss=0.1)
    assert (await bench.job(JOB)).best_step == 0
    await commit(bench, task, 2, train_loss=0.1, validation_loss=3.0)
    await commit(bench, task, 2, train_loss=0.1, validation_loss=3.0)
    assert (await bench.job(JOB)).best_step == 2


@pytest.mark.parametrize("full", [False, True])
async def test_a_reward_model_is_neither_asked_nor_trained_on(bench: Any, *, full: bool) -> None:
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE)
    await bench.create("one", **REWARD, **({"full": FullConfig()} if full else {}))
    task, _ = await bench.claim()
    files = await (full_files(bench) if full else adapter_files(bench))
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, files, {}))
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    job = await bench.job(JOB)
    model = await bench.model(job.tuned_model)
    assert (model.kind, model.base_model) == (Model.KIND_REWARD, "" if full else bench.MODEL)
    assert model.architecture == ("LlamaForSequenceClassification" if full else "")
    for changes in (
        {"start_from": model.name},
        {"start_from": f"{JOB}/checkpoints/step-1"},
        {"base_model": model.name},
    ):
        with pytest.raises(InvalidArgument, match=r"must be (of )?a model of words, got"):
            await bench.create("two", **{"base_model": "", **DPO, **changes})


async def test_a_reward_model_does_not_start_from_a_checkpoint_of_all_weights(bench: Any) -> None:
    await bench.create("one", full=FullConfig())
    task, _ = await bench.claim()
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, await full_files(bench), {}))
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE)
    with pytest.raises(
        InvalidArgument, match=r"start_from: must be a model: .*/step-1 is a checkpoint of all"
    ):
        await bench.create("two", base_model="", start_from=f"{JOB}/checkpoints/step-1", **REWARD)


async def test_a_metric_of_a_label_that_no_validation_row_has_is_refused(bench: Any) -> None:
    validation = RenderingSplitStatistics(
        split=SPLIT_VALIDATION,
        roles=[
            RenderingRoleStatistics(role=role, tokens=LengthStatistics(count=5))
            for role in ("desirable", "mismatched")
        ],
    )
    bench.add_rendering(kind=RENDERING_KIND_UNPAIRED, split_statistics=[validation])
    for metric in ("validation_reward_margin", "validation_reward_rejected"):
        with pytest.raises(
            FailedPrecondition, match=f"must have undesirable validation rows, as {metric}"
        ) as caught:
            await bench.create("one", **KTO, selection=Selection(metric=metric))
        assert caught.value.reason == Reason.METRIC_NOT_MEASURED
    await bench.create("one", **KTO, selection=Selection(metric="validation_reward_chosen"))


async def test_a_plan_refuses_a_pair_longer_than_a_forward_pass_by_its_line(bench: Any) -> None:
    pairs = tuple(
        RowLength(row=row, num_tokens=11 if row == 7 else 8, num_supervised=3, unit=row - row % 2)
        for row in range(10)
    )
    train = RenderingSplitStatistics(split=SPLIT_TRAIN, num_units=5, longest_unit_tokens=19)
    bench.know(bench.add_rendering(kind=RENDERING_KIND_PREFERENCE, split_statistics=[train]), pairs, ())
    small = {**DPO, "hyperparameters": Hyperparameters(micro_batch_tokens=18)}
    with pytest.raises(
        InvalidArgument,
        match=r"must be at least 19, the longest unit, of 2 rows \(from row 6 on\), got 18; the longest is "
        r"songs.jsonl:7$",
    ) as caught:
        await bench.plan(**small)
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.metadata == {"rows": "6", "places": "songs.jsonl:7"}
    (violation,) = caught.value.violations
    assert violation.field == "fine_tuning_job.hyperparameters.micro_batch_tokens"


async def test_a_plan_refuses_a_row_beyond_the_context_by_its_line(bench: Any) -> None:
    """Also where statistics cannot tell, as a row that teaches nothing may be the longest."""
    rows = tuple(RowLength(row=row, num_tokens=60 + row, num_supervised=row) for row in range(9))
    bench.know(bench.add_rendering(), rows, ())
    with pytest.raises(
        FailedPrecondition, match=r"row 8 has 68; create .*; the longest is songs.jsonl:9"
    ) as caught:
        await bench.plan()
    assert caught.value.metadata == {"rows": "8", "num_tokens": "68", "places": "songs.jsonl:9"}
    bench.know(bench.renderings.views[bench.RENDERING], rows[1:], ())
    with pytest.raises(FailedPrecondition, match=r"; the longest is songs.jsonl:9"):
        await bench.plan()


async def test_a_pair_longer_than_a_forward_pass_is_refused_before_the_job_exists(bench: Any) -> None:
    train = RenderingSplitStatistics(split=SPLIT_TRAIN, num_units=10, longest_unit_tokens=20)
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE, split_statistics=[train])
    with pytest.raises(
        InvalidArgument, match=r"micro_batch_tokens must be at least 20, the longest unit, of 2 rows"
    ):
        await bench.create("one", **DPO, hyperparameters=Hyperparameters(micro_batch_tokens=15))
    await bench.create("one", **DPO, hyperparameters=Hyperparameters(micro_batch_tokens=20))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"warmup_ratio": 0.95, "batch_rows": 4}, "warmup_ratio is 0.95 and there are 5 steps"),
        (
            {
                "learning_rate_schedule": LEARNING_RATE_SCHEDULE_WARMUP_STABLE_DECAY,
                "decay_steps": 900,
                "batch_rows": 4,
            },
            "decay_steps is 900 and there are 5 steps: the learning rate falls from the first one on",
        ),
    ],
)
async def test_a_rate_that_never_reaches_its_peak_is_a_warning(
    bench: Any, changes: dict[str, Any], warning: str
) -> None:
    plan = await bench.plan(hyperparameters=Hyperparameters(**changes))
    assert any(one.startswith(warning) for one in plan.warnings), plan.warnings
    assert not any("peak" in one for one in (await bench.plan()).warnings)


async def test_a_selection_that_chooses_nothing_is_a_warning(bench: Any) -> None:
    plan = await bench.plan(selection=Selection(patience=3))
    assert any(one.startswith("there is one validation") for one in plan.warnings), plan.warnings
    plan = await bench.plan(selection=Selection(patience=3), validation_interval_steps=1)
    assert not any("one validation" in one for one in plan.warnings)


async def test_names_of_a_project_called_checkpoints_are_those_of_models(bench: Any) -> None:
    assert not is_checkpoint("projects/checkpoints/models/m")
    assert is_checkpoint("projects/checkpoints/fineTuningJobs/j/checkpoints/step-1")


def test_every_field_of_a_preference_job_belongs_to_a_loss() -> None:
    from luthier.training.jobs import methods

    fields = {field.name for field in PreferenceConfig.DESCRIPTOR.fields} - {"loss"}
    assert fields == set().union(*methods._OPTIONS.values())
    assert methods._OPTIONS.keys() == methods._LOSS_DEFAULTS.keys() == set(Loss.values()) - {0}
    assert {one.name for one in FineTuningJob.DESCRIPTOR.oneofs_by_name["method"].fields} == (
        methods.LEARNING_RATES.keys()
    )
