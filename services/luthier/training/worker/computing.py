"""Train what a task says: rows and weights in, metrics, checkpoints and a tuned model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch

from luthier.errors import FailedPrecondition, Reason
from luthier.lm.checkpointing import checkpoint_layers
from luthier.lm.load import load_model
from luthier.lm.memory import freed_memory_kept, limit_bytes
from luthier.lm.model_config import read_config
from luthier.lm.shape import shape_of
from luthier.training.fitting import Fit
from luthier.training.recipe_settings import (
    batch_settings,
    is_divided,
    precision_of,
    ranks_of,
    rendering_names,
    renderings_used,
    schedule_of,
    selection_of,
    states_of,
)
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import BatchSettings, PlanTotals, count_steps, plan_digest
from luthier.training.recipes.collective import Collective, OneRank
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import Course
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, settings_record
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.overlap import overlap
from luthier.training.recipes.position import FILE_NAME, Mark
from luthier.training.recipes.rollouts import Rollouts
from luthier.training.recipes.shards import LARGEST_KEPT_BYTES, Division
from luthier.training.recipes.survey import (
    Survey,
    require_fitting,
    require_ranks,
    steps_with_idle_ranks,
    survey,
)
from luthier.training.worker.determinism import demand_determinism
from luthier.training.worker.failures import named_errors
from luthier.training.worker.held_out import held_out_scores
from luthier.training.worker.item_fields import ItemCheck
from luthier.training.worker.methods import Loss, is_compared, loss_of
from luthier.training.worker.order import Desk, Paused, TrainEnd, TrainOrder
from luthier.training.worker.reference import give_reference
from luthier.training.worker.reward_models import LoadedRewardModel, load_reward_models
from luthier.training.worker.rollouts import Records, RolloutsElsewhere, rollouts_of, stop_tokens
from luthier.training.worker.rows import RowPlaces, read_corpus, read_rows, row_placed
from luthier.training.worker.run_recorder import RunRecorder
from luthier.training.worker.steps import Begun, made_steps
from luthier.training.worker.surroundings import surroundings
from luthier.training.worker.trial import Trial, bytes_beside
from luthier.training.worker.weights import base_model_folder, weights_of
from luthier.v1 import fine_tuning_job_pb2
from luthier.work.machine import available_bytes, memory_bytes


def computed(
    order: TrainOrder, desk: Desk, device: torch.device, collective: Collective | None = None
) -> TrainEnd:
    """Train on a device, from the task's checkpoint on if it has one, and return what was made, or that it paused.

    `collective` are the ranks that train together, each of which is called with the same order; None: this one alone.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE; TOO_MANY_RANKS.
        ResourceExhausted: OUT_OF_MEMORY.
        Unavailable: CRASHED, a GPU failed; RANK_LOST, RANKS_DIVERGED.
        LuthierError: rows or files do not fit together; what the desk raised.
    """
    chosen: list[Fit] = []
    demand_determinism(device)
    with named_errors(order.task.train.job, device, chosen), _memory_kept(order.task.train.job):
        if device.type != "cpu":
            # Triton's kernels are loaded on the device that is current.
            torch.cuda.set_device(device)
        return _train(order, desk, device, collective or OneRank(), chosen)


def _memory_kept(job: fine_tuning_job_pb2.FineTuningJob) -> AbstractContextManager[None]:
    """Return a block in which freed memory is kept, in small blocks alone where ranks divide the model."""
    return freed_memory_kept(LARGEST_KEPT_BYTES) if is_divided(job) else freed_memory_kept()


def _train(
    order: TrainOrder, desk: Desk, device: torch.device, collective: Collective, chosen: list[Fit]
) -> TrainEnd:
    """Train; `chosen` is told what its passes are."""
    spec = order.task.train
    corpus, mixture, records, places = _rows(order, desk)
    batches = batch_settings(spec.job)
    found = _surveyed(spec.job, corpus, batches, mixture)
    repeated = overlap(corpus)
    if repeated is not None:
        desk.log(repeated.text(lambda row: row_placed(row, mixture, places)), "WARNING")
    desk.progress("loading model", 0, 0, "files")
    folder = base_model_folder(desk)
    totals = _checked(desk, found, batches, read_config(folder))
    # What ranks divide comes to their devices unit by unit.
    to = "cpu" if is_divided(spec.job) else device
    model = load_model(folder, device=to, precision=precision_of(spec.job.base_precision))
    loss = loss_of(spec.job)
    settings = _settings(spec.job, batches, totals.num_steps, mixture)
    # The first rank grades for all.
    loaded = load_reward_models(desk, model, device) if collective.rank == 0 else []
    used = renderings_used(found, mixture, [spec.rendering_digest, *spec.mixed_rendering_digests])
    division = Division(collective=collective, device=device) if is_divided(spec.job) else None
    weights = weights_of(desk, model, is_compared=is_compared(loss), division=division)
    around = surroundings(model, collective.num_ranks, is_divided=weights.shards is not None)
    run = _identity(spec.job, corpus, settings, loss, around)
    engine = Engine(weights, run.optimiser, model.device, collective)
    engine.mark = Mark(desk.scratch / FILE_NAME, mixture)
    recorder = RunRecorder(desk=desk, model=model, used=used, num_ranks=collective.num_ranks, chosen=chosen)
    fit = _fit(desk, engine, corpus, settings, found, loaded, recorder)
    # As passes are cut here; what the run is known by has them as the job says.
    batches = replace(batches, micro_batch_tokens=fit.micro_batch_tokens)
    if collective.num_ranks > 1:
        _check_ranks(desk, count_steps(corpus.lengths("TRAIN"), batches, mixture), collective.num_ranks)
    begun = _begin(desk, engine, run, corpus, loss, fit.micro_batch_tokens)
    run = recorder.as_begun(run, begun.changed)
    record = recorder.chosen_is(fit, changed=begun.changed)
    settings = replace(settings, batches=batches)
    with ExitStack() as stack:
        rollouts: Rollouts | None = None
        if records is not None and collective.rank:
            rollouts = RolloutsElsewhere(stop_tokens(order.renderings[0].rendering, model))
        elif records is not None:
            longest = found.longest.num_tokens if found.longest else 0
            rendering = order.renderings[0].rendering
            graded = rollouts_of(desk, records, rendering, model, loaded, fit.micro_batch_tokens, longest)
            rollouts = stack.enter_context(graded)
        result = made_steps(desk, corpus, settings, run, begun, loss, rollouts)
    if _is_scored(spec.job, engine, result):
        recorder.scores(record, held_out_scores(engine, corpus, result.step))
    return result


def _is_scored(job: fine_tuning_job_pb2.FineTuningJob, engine: Engine, result: TrainEnd) -> bool:
    """Whether held-out tokens are looked at: at the end, by a model of words that each rank has whole."""
    has_words = not (job.HasField("reinforcement") or job.HasField("reward_model"))
    return has_words and engine.weights.shards is None and not isinstance(result, Paused)


def _fit(
    desk: Desk,
    engine: Engine,
    corpus: Corpus,
    settings: Settings,
    found: Survey,
    loaded: Sequence[LoadedRewardModel],
    recorder: RunRecorder,
) -> Fit:
    """Return what passes are: the first rank tries, and all do the same. Raises as `Trial.choose`."""
    model = engine.weights.model
    collective = engine.collective
    # What is free is known once all have loaded; ranks of a machine share its memory, each has its own GPU's.
    collective.gathered(None)
    sharing = collective.num_ranks if model.device.type == "cpu" else 1
    limits = collective.gathered(limit_bytes(model.device, available_bytes(), sharing))
    trial = Trial(
        desk=desk,
        engine=engine,
        corpus=corpus,
        settings=settings,
        found=found,
        limit=min(limits),
        capacity=_capacity_bytes(model.device) // sharing,
    )
    beside = bytes_beside(model, (one.valuer.model for one in loaded))
    # As transformers has it: what the file leaves open is said there.
    shape = shape_of({**model.config.to_dict(), "architectures": [type(model).__name__]})
    if engine.weights.shards is None:
        fit = collective.of_first(lambda: trial.choose(shape, beside, recorder))
    else:
        fit = trial.choose(shape, max(collective.gathered(beside)), recorder)
    checkpoint_layers(model, fit.kept)
    return fit


def _capacity_bytes(device: torch.device) -> int:
    """Return all memory of a device, also what others hold of it just now; 0: nobody says."""
    if device.type == "cpu":
        return memory_bytes()
    return int(torch.cuda.get_device_properties(device).total_memory)


def _rows(
    order: TrainOrder, desk: Desk
) -> tuple[Corpus, Mixture | None, Records | None, tuple[RowPlaces, ...]]:
    """Return the rows of a task, how its renderings are mixed, the records that graders look at, and places of rows.

    There are records where answers are to be drawn to them.

    Raises:
        InvalidArgument: TEMPLATE_FIELD_MISSING, a record has not what the grader reads of it.
        LuthierError: as `read_corpus`.
    """
    job = order.task.train.job
    if not job.HasField("reinforcement"):
        corpus, mixture, places = read_rows(order, desk.check)
        return corpus, mixture, None, places
    chosen, records, of_rows = job.reinforcement, Records(), RowPlaces()
    fields = ItemCheck(chosen.grader, desk.check)

    def see(batch: Any) -> None:
        records.add(batch)
        fields.add(batch)
        of_rows.add(batch)

    corpus = read_corpus(order.renderings[0], desk.check, see)
    fields.require()
    corpus.expect_answers(chosen.max_new_tokens)
    return corpus, None, records, (of_rows,)


def _begin(
    desk: Desk,
    engine: Engine,
    run: checkpoint.RunIdentity,
    corpus: Corpus,
    loss: Loss | None,
    micro_batch_tokens: int,
) -> Begun:
    spec = desk.task.train
    resumed = desk.scratch / "resume" if spec.checkpoint_files else None
    if resumed is not None:
        for number, file in enumerate(spec.checkpoint_files):
            desk.progress("loading checkpoint", number, len(spec.checkpoint_files), "files")
            desk.fetch_into(resumed, file)
    compared = is_compared(loss)
    reference = give_reference(desk, engine, corpus, resumed, micro_batch_tokens) if compared else None
    extra = [] if reference is None else [reference]
    if resumed is None:
        return Begun(engine=engine, course=Course(), changed=[], extra=extra)
    desk.log(f"resuming after step {spec.checkpoint_step}", step=spec.checkpoint_step)
    course, changed = checkpoint.load(resumed, engine, run)
    return Begun(engine=engine, course=course, changed=changed, extra=extra)


def _surveyed(
    job: fine_tuning_job_pb2.FineTuningJob, corpus: Corpus, batches: BatchSettings, mixture: Mixture | None
) -> Survey:
    train, validation = corpus.lengths("TRAIN"), corpus.lengths("VALIDATION")
    return survey(train, validation, batches, mixture, is_cut=_shares_known_passes(job))


def _shares_known_passes(job: fine_tuning_job_pb2.FineTuningJob) -> bool:
    """Whether several ranks are the least; what reinforcement learns from in a step is known only once it is drawn."""
    return ranks_of(job)[0] > 1 and not job.HasField("reinforcement")


def _checked(desk: Desk, found: Survey, batches: BatchSettings, config: Mapping[str, Any]) -> PlanTotals:
    """Check what a plan checks, now that every row is known, and say what is not used.

    Raises:
        FailedPrecondition: NO_SUPERVISED_TOKENS, SEQUENCE_TOO_LONG, TOO_MANY_RANKS.
        InvalidArgument: SEQUENCE_TOO_LONG.
    """
    context_length = int(config.get("max_position_embeddings") or 0)
    job = desk.task.train.job
    for rendering, part in zip(rendering_names(job), (found, *found.mixed), strict=True):
        of = rendering if found.mixed else ""
        require_fitting(part, batches, context_length, job.reinforcement.max_new_tokens, of)
        if part.longest_train is None:
            raise FailedPrecondition(
                f"at least one training row of {rendering} must have a supervised token, none of "
                f"{part.num_train_rows} has",
                reason=Reason.NO_SUPERVISED_TOKENS,
                metadata={"rendering": rendering},
            )
        unused = part.num_train_rows - part.num_teaching_rows
        if unused:
            whose = f" of {of}" if of else ""
            text = f"{unused} of {part.num_train_rows} training rows{whose} teach nothing and are not used"
            desk.log(text, "WARNING")
    assert found.totals is not None, "rows that teach and fit were counted"
    if _shares_known_passes(job):
        require_ranks(found.totals, ranks_of(job)[0], is_open=not batches.micro_batch_tokens)
    return found.totals


def _check_ranks(desk: Desk, totals: PlanTotals, num_ranks: int) -> None:
    """Check that there is work for a job's least ranks, and say how often some of the run's have none.

    Raises:
        FailedPrecondition: TOO_MANY_RANKS.
    """
    job = desk.task.train.job
    # What reinforcement learns from in a step is known only once it is drawn.
    if job.HasField("reinforcement"):
        return
    require_ranks(totals, ranks_of(job)[0], is_open=not job.hyperparameters.micro_batch_tokens)
    idle = steps_with_idle_ranks(totals, num_ranks)
    if num_ranks > 1 and idle:
        text = (
            f"{idle} of {totals.num_steps} steps have fewer forward passes than the run's {num_ranks} ranks"
        )
        desk.log(f"{text}, some of which are idle then", "WARNING")


def _settings(
    job: fine_tuning_job_pb2.FineTuningJob, batches: BatchSettings, num_steps: int, mixture: Mixture | None
) -> Settings:
    return Settings(
        batches=batches,
        schedule=schedule_of(job, num_steps),
        checkpoint_interval_steps=job.checkpoint_interval_steps,
        validation_interval_steps=job.validation_interval_steps,
        selection=selection_of(job),
        mixture=mixture,
    )


def _identity(
    job: fine_tuning_job_pb2.FineTuningJob,
    corpus: Corpus,
    settings: Settings,
    loss: Loss | None,
    around: Mapping[str, str],
) -> checkpoint.RunIdentity:
    chosen = job.hyperparameters
    return checkpoint.RunIdentity(
        plan_digest=plan_digest(
            corpus.lengths("TRAIN"), corpus.lengths("VALIDATION"), settings.batches, settings.mixture
        ),
        settings=settings_record(settings, loss),
        optimiser=OptimiserSettings(
            weight_decay=chosen.weight_decay,
            max_grad_norm=chosen.max_grad_norm,
            states=states_of(chosen.optimiser_states),
        ),
        surroundings=around,
    )
