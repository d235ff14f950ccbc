"""Train what a task says: rows and weights in, metrics, checkpoints and a tuned model out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from luthier.errors import FailedPrecondition, LuthierError, Reason
from luthier.lm.load import load_model
from luthier.lm.memory import freed_memory_kept
from luthier.lm.model_config import read_config
from luthier.lm.shape import shape_of
from luthier.training.fitting import Fit, memory_message
from luthier.training.recipe_settings import (
    batch_settings,
    named_kept,
    rendering_names,
    renderings_used,
    schedule_of,
    selection_of,
)
from luthier.training.recipes import checkpoint
from luthier.training.recipes.batches import BatchSettings, PlanTotals, plan_digest
from luthier.training.recipes.corpus import Corpus
from luthier.training.recipes.course import CheckpointDue, Course, Warned
from luthier.training.recipes.engine import Engine, OptimiserSettings
from luthier.training.recipes.loop import Settings, settings_record
from luthier.training.recipes.mixture import Mixture
from luthier.training.recipes.overlap import overlap
from luthier.training.recipes.rollouts import Rollouts
from luthier.training.recipes.survey import Survey, require_fitting, survey
from luthier.training.worker.item_fields import ItemCheck
from luthier.training.worker.methods import Loss, is_compared, loss_of, steps_of
from luthier.training.worker.order import Desk, TrainOrder, out_of_memory
from luthier.training.worker.reference import give_reference
from luthier.training.worker.reward_models import load_reward_models
from luthier.training.worker.rollouts import Records, rollouts_of
from luthier.training.worker.rows import read_corpus, read_rows
from luthier.training.worker.surroundings import run_record, surroundings
from luthier.training.worker.trial import Trial, bytes_beside, is_for_memory
from luthier.training.worker.weights import weights_of
from luthier.v1 import fine_tuning_job_pb2
from luthier.worker.v1 import task_pb2


def computed(order: TrainOrder, desk: Desk, device: torch.device) -> task_pb2.TrainResult:
    """Train on a device, from the task's checkpoint on if it has one, and return what was made.

    Raises:
        FailedPrecondition: LOSS_NOT_FINITE.
        ResourceExhausted: OUT_OF_MEMORY.
        LuthierError: rows or files do not fit together; what the desk raised.
    """
    chosen: list[Fit] = []
    with _memory_errors(order.task.train.job, chosen), freed_memory_kept():
        return _train(order, desk, device, chosen)


def _train(order: TrainOrder, desk: Desk, device: torch.device, chosen: list[Fit]) -> task_pb2.TrainResult:
    """Train; `chosen` is told what its passes are."""
    spec = order.task.train
    corpus, mixture, records = _rows(order, desk)
    batches = batch_settings(spec.job)
    found = survey(corpus.lengths("TRAIN"), corpus.lengths("VALIDATION"), batches, mixture)
    repeated = overlap(corpus)
    if repeated is not None:
        desk.log(repeated.text(mixture), "WARNING")
    desk.progress("loading model", 0, 0, "files")
    folder = _base_model_folder(desk)
    totals = _checked(desk, found, batches, read_config(folder))
    model = load_model(folder, device=device)
    loss = loss_of(spec.job)
    settings = _settings(spec.job, batches, totals.num_steps, mixture)
    run = _identity(spec.job, corpus, settings, loss, model)
    loaded = load_reward_models(desk, model)
    used = renderings_used(found, mixture, [spec.rendering_digest, *spec.mixed_rendering_digests])
    weights = weights_of(desk, model, is_compared=is_compared(loss))
    engine = Engine(weights, run.optimiser, model.device)
    recorder = _Recorder(desk=desk, model=model, used=used, chosen=chosen)
    trial = Trial(desk=desk, engine=engine, corpus=corpus, settings=settings, found=found)
    beside = bytes_beside(model, (one.valuer.model for one in loaded))
    # As transformers has it: what the file leaves open is said there.
    shape = shape_of({**model.config.to_dict(), "architectures": [type(model).__name__]})
    fit = trial.choose(shape, beside, recorder)
    begun = _begin(desk, engine, run, corpus, loss, fit.micro_batch_tokens)
    if begun.changed:
        run = replace(run, bitwise=False)
        changed = ", ".join(begun.changed)
        text = f"since the run began, {changed} changed: its results may differ from an undisturbed run's"
        desk.log(text, "WARNING")
    recorder.chosen_is(fit, bitwise=run.bitwise)
    # As passes are cut here; what the run is known by has them as the job says.
    settings = replace(settings, batches=replace(batches, micro_batch_tokens=fit.micro_batch_tokens))
    with ExitStack() as stack:
        rollouts = None
        if records is not None:
            longest = found.longest.num_tokens if found.longest else 0
            rendering = order.renderings[0].rendering
            graded = rollouts_of(desk, records, rendering, model, loaded, fit.micro_batch_tokens, longest)
            rollouts = stack.enter_context(graded)
        return _steps(desk, corpus, settings, run, begun, loss, rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorder:
    """Keeps with the job what exactly runs, with what its passes are.

    Attributes:
        desk: of the task.
        model: that trains.
        used: what its steps take of each rendering of a mixture.
        chosen: is told what passes are tried, and which were chosen.
    """

    desk: Desk
    model: PreTrainedModel
    used: Sequence[fine_tuning_job_pb2.RenderingUse]
    chosen: list[Fit]

    def tries(self, fit: Fit) -> None:
        """Keep what a trial is expected to take: a process that is ended for want of memory says nothing any more."""
        self.desk.run_record(self._record(fit, bitwise=True))

    def chosen_is(self, fit: Fit, *, bitwise: bool = True) -> None:
        """Keep what passes are from now on, in whatever attempt."""
        record = self._record(fit, bitwise=bitwise)
        record.micro_batch_tokens = fit.micro_batch_tokens
        record.activation_checkpointing = named_kept(fit.kept)
        self.desk.run_record(record)

    def _record(self, fit: Fit, *, bitwise: bool) -> fine_tuning_job_pb2.RunRecord:
        self.chosen[:] = [fit]
        record = run_record(self.desk.task.train, self.model, self.used, bitwise=bitwise)
        record.memory.CopyFrom(memory_message(fit.footprint))
        return record


def _rows(order: TrainOrder, desk: Desk) -> tuple[Corpus, Mixture | None, Records | None]:
    """Return the rows of a task, how its renderings are mixed, and the records that graders look at.

    There are records where answers are to be drawn to them.

    Raises:
        InvalidArgument: TEMPLATE_FIELD_MISSING, a record has not what the grader reads of it.
        LuthierError: as `read_corpus`.
    """
    job = order.task.train.job
    if not job.HasField("reinforcement"):
        return *read_rows(order, desk.check), None
    chosen, records = job.reinforcement, Records()
    fields = ItemCheck(chosen.grader, desk.check)

    def see(batch: Any) -> None:
        records.add(batch)
        fields.add(batch)

    corpus = read_corpus(order.renderings[0], desk.check, see)
    fields.require()
    corpus.expect_answers(chosen.max_new_tokens)
    return corpus, None, records


def _steps(
    desk: Desk,
    corpus: Corpus,
    settings: Settings,
    run: checkpoint.RunIdentity,
    begun: _Begun,
    loss: Loss | None,
    rollouts: Rollouts | None,
) -> task_pb2.TrainResult:
    """Make all steps that are left, telling of each and storing the checkpoints that are due."""
    engine, course, num_steps = begun.engine, begun.course, settings.schedule.num_steps
    desk.progress("training", course.step, num_steps, "steps")
    files: Sequence[task_pb2.BlobFile] = list(desk.task.train.checkpoint_files)
    metrics: Mapping[str, float] = course.metrics
    step = first_step = course.step
    began = time.monotonic()
    for event in steps_of(loss, engine, corpus, settings, course, desk.check, rollouts):
        if isinstance(event, Warned):
            desk.log(event.text, "WARNING", step=event.step)
            continue
        if isinstance(event, CheckpointDue):
            course = event.course
            folder = desk.scratch / f"step-{course.step}"
            checkpoint.save(folder, engine, course, run)
            paths = [folder / name for name in checkpoint.files_of(engine.weights)]
            files = desk.store_checkpoint(course.step, [*paths, *begun.extra], course.metrics)
            shutil.rmtree(folder)
            continue
        step, metrics = event.step, event.metrics
        desk.metrics(step, metrics)
        step_seconds = (time.monotonic() - began) / (step - first_step)
        remaining_seconds = step_seconds * (num_steps - step)
        desk.progress("training", step, num_steps, "steps", remaining_seconds=remaining_seconds, step=step)
    if course.is_stopped:
        desk.log(
            f"ended early: {course.stale_validations} validations since step {course.best_step} were not better"
        )
    elif step != num_steps or not files:
        raise FailedPrecondition(
            f"a run must make the {num_steps} steps of its plan and at least one, it made {step}",
            reason=Reason.NO_SUPERVISED_TOKENS,
        )
    return task_pb2.TrainResult(
        files=[file for file in files if file.path in engine.weights.result_files],
        step=course.step,
        metrics=metrics,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A run before its next step.

    Attributes:
        engine: fresh, or from the task's checkpoint.
        course: likewise.
        changed: what has changed around the run.
        extra: files that each checkpoint has besides its own.
    """

    engine: Engine
    course: Course
    changed: list[str]
    extra: list[Path]


def _begin(
    desk: Desk,
    engine: Engine,
    run: checkpoint.RunIdentity,
    corpus: Corpus,
    loss: Loss | None,
    micro_batch_tokens: int,
) -> _Begun:
    spec = desk.task.train
    resumed = desk.scratch / "resume" if spec.checkpoint_files else None
    if resumed is not None:
        for file in spec.checkpoint_files:
            desk.fetch_into(resumed, file)
    compared = is_compared(loss)
    reference = give_reference(desk, engine, corpus, resumed, micro_batch_tokens) if compared else None
    extra = [] if reference is None else [reference]
    if resumed is None:
        return _Begun(engine=engine, course=Course(), changed=[], extra=extra)
    desk.log(f"resuming after step {spec.checkpoint_step}", step=spec.checkpoint_step)
    course, changed = checkpoint.load(resumed, engine, run)
    return _Begun(engine=engine, course=course, changed=changed, extra=extra)


def _checked(desk: Desk, found: Survey, batches: BatchSettings, config: Mapping[str, Any]) -> PlanTotals:
    """Check what a plan checks, now that every row is known, and say what is not used.

    Raises:
        FailedPrecondition: NO_SUPERVISED_TOKENS, SEQUENCE_TOO_LONG.
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
    return found.totals


def _base_model_folder(desk: Desk) -> Path:
    files = desk.task.train.base_model_files
    folder = desk.scratch / "base"
    for number, file in enumerate(files):
        desk.check()
        desk.progress("loading model", number, len(files), "files")
        wanted = task_pb2.BlobFile(path=file.path, sha256=file.sha256, size_bytes=file.size_bytes)
        desk.fetch_into(folder, wanted)
    return folder


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
    model: PreTrainedModel,
) -> checkpoint.RunIdentity:
    chosen = job.hyperparameters
    return checkpoint.RunIdentity(
        plan_digest=plan_digest(
            corpus.lengths("TRAIN"), corpus.lengths("VALIDATION"), settings.batches, settings.mixture
        ),
        settings=settings_record(settings, loss),
        optimiser=OptimiserSettings(weight_decay=chosen.weight_decay, max_grad_norm=chosen.max_grad_norm),
        surroundings=surroundings(model),
    )


@contextmanager
def _memory_errors(job: fine_tuning_job_pb2.FineTuningJob, chosen: Sequence[Fit]) -> Iterator[None]:
    """Turn what torch raises for want of memory into OUT_OF_MEMORY with a hint, and what was expected."""
    try:
        yield
    except LuthierError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_for_memory(error):
            raise
        tokens = chosen[-1].micro_batch_tokens if chosen else 0
        expected = chosen[-1].words if chosen else ""
        raise out_of_memory(job, str(error), tokens, expected) from error
