"""`luthier jobs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.cli.deleting import pass_deletion
from luthier.client.cli.drafts import Draft, field_option, pass_draft
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, MetricPoint

F = TypeVar("F", bound="Callable[..., Any]")


@click.group(cls=SuggestingGroup)
def jobs() -> None:
    """Plan, start, watch and cancel fine-tuning jobs."""


_JOB_OPTIONS = (
    field_option(
        "--model",
        field="base_model",
        help="Base model to tune.  [required, if not in a file or by --start-from]",
    ),
    field_option(
        "--rendering", field="rendering", help="Rendering to train on.  [required, if not in a file]"
    ),
    field_option(
        "--mix",
        "mixed",
        field="mixed_renderings",
        metavar="RENDERING=SHARE",
        multiple=True,
        is_read=False,
        help="Rendering to mix in, and its share of what is learnt; --rendering has the rest.  [repeatable]",
    ),
    field_option(
        "--start-from", field="start_from", help="Model or JOB/CHECKPOINT to go on with, in place of --model."
    ),
    field_option(
        "--full",
        field="full",
        is_flag=True,
        is_read=False,
        help="Train all weights, not an adapter. The result is a model of its own.",
    ),
    field_option(
        "--preference",
        field="preference.loss",
        type=click.Choice(["dpo", "ipo", "orpo", "simpo", "kto"]),
        help="Prefer the chosen answers of a PREFERENCE rendering; kto: the desirable ones of an UNPAIRED one.",
    ),
    field_option(
        "--reward-model",
        field="reward_model",
        is_flag=True,
        is_read=False,
        help="Train a model that values answers, on a PREFERENCE rendering.",
    ),
    field_option("--rank", field="lora.rank", type=int, help="Rank of the adapter. [default: 16]"),
    field_option(
        "--alpha",
        field="lora.alpha",
        type=float,
        help="Scale of the adapter is alpha / rank. [default: 2 x rank]",
    ),
    field_option(
        "--target",
        field="lora.target_modules",
        multiple=True,
        help="Linear module to adapt. [default: all but the head]",
    ),
    field_option(
        "--epochs", field="hyperparameters.num_epochs", type=int, help="Passes over the rows. [default: 1]"
    ),
    field_option("--max-steps", field="hyperparameters.max_steps", type=int, help="Optimiser steps at most."),
    field_option(
        "--batch-tokens",
        field="hyperparameters.batch_tokens",
        type=int,
        help="Tokens in a step. [default: 4096]",
    ),
    field_option(
        "--batch-rows",
        field="hyperparameters.batch_rows",
        excludes="--batch-tokens",
        type=int,
        help="Rows in a step, in place of --batch-tokens.",
    ),
    field_option(
        "--learning-rate",
        field="hyperparameters.learning_rate",
        type=float,
        help="Peak learning rate. [default: by method, 2e-4 for an adapter, a tenth with --full]",
    ),
    field_option(
        "--warmup-steps",
        field="hyperparameters.warmup_steps",
        type=int,
        help="Steps to rise to it. [default: 0]",
    ),
    field_option(
        "--schedule",
        field="hyperparameters.learning_rate_schedule",
        type=click.Choice(["constant", "linear", "cosine", "warmup-stable-decay"]),
        help="After it. [default: cosine]",
    ),
    field_option("--seed", field="hyperparameters.seed", type=int, help="Seed of the run. [default: 0]"),
    field_option(
        "--checkpoint-interval",
        field="checkpoint_interval_steps",
        type=int,
        help="Steps between checkpoints. [default: 25]",
    ),
    field_option(
        "--max-checkpoints",
        field="max_checkpoints",
        type=int,
        help="Checkpoints kept besides the best. [default: 3]",
    ),
    field_option(
        "--validation-interval",
        field="validation_interval_steps",
        type=int,
        help="Steps between validations. [default: an epoch]",
    ),
)


def _job_options(function: F) -> F:
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return function


def _kind() -> type[FineTuningJob]:
    from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

    return FineTuningJob


def _job(
    draft: Draft[FineTuningJob], mixed: Sequence[str], *, full: bool, reward_model: bool
) -> FineTuningJob:
    """Return the job that is wanted, all its weights trained with `full`.

    The one in the file may be a job that exists: its tuned model's name was then made of its own and is not a wish.
    """
    job = draft.message
    if job.tuned_model_id and job.tuned_model_id == short(job.name):
        job.tuned_model_id = ""
    if mixed:
        # Flags win over the file, whose own share may be that of another mixture.
        del job.mixed_renderings[:]
        job.rendering_share = 0
        for word in mixed:
            rendering, share = _mixed(word)
            job.mixed_renderings.add(rendering=rendering, share=share)
    if full:
        if job.HasField("lora"):
            raise click.UsageError(
                "--full trains all weights: give no --rank, --alpha, --target, and no lora"
            )
        job.full.SetInParent()
    if reward_model:
        if job.HasField("preference"):
            raise click.UsageError("give one of --preference and --reward-model")
        job.reward_model.SetInParent()
    wanted = draft.finish()
    if not (wanted.base_model or wanted.start_from):
        raise click.UsageError(
            "Missing option '--model' or '--start-from', or one of them in a file or by --set."
        )
    return wanted


def _mixed(word: str) -> tuple[str, float]:
    rendering, _, share = word.rpartition("=")
    with suppress(ValueError):
        if rendering:
            return rendering, float(share)
    raise click.BadParameter(
        f"must be RENDERING=SHARE, such as general=0.2, got {word!r}", param_hint="--mix"
    )


@jobs.command()
@_job_options
@pass_session
@pass_draft(_kind)
def plan(
    session: Session, draft: Draft[FineTuningJob], mixed: Sequence[str], *, full: bool, reward_model: bool
) -> None:
    """Say what a job would do, without starting it."""
    from luthier.client.cli.views import plan_facts

    job = _job(draft, mixed, full=full, reward_model=reward_model)
    session.show(session.client.jobs.plan(job), plan_facts)
    begin = f"--start-from {short(job.start_from)}" if job.start_from else f"--model {short(job.base_model)}"
    flags = [
        *(f"--mix {word}" for word in mixed),
        *(["--full"] if full else []),
        *(["--reward-model"] if reward_model else []),
    ]
    words = [begin, f"--rendering {short(job.rendering)}", *flags, draft.words]
    session.hint(f"jobs create {' '.join(filter(None, words))}")


@jobs.command()
@_job_options
@click.option("--name", default="", help="Id of the job. [default: made by the service]")
@field_option("--tuned-model", field="tuned_model_id", help="Id of the tuned model. [default: the job's]")
@click.option("--watch", "watches", is_flag=True, help="Watch the job until it is done.")
@pass_session
@pass_draft(_kind)
def create(
    session: Session,
    draft: Draft[FineTuningJob],
    name: str,
    mixed: Sequence[str],
    *,
    full: bool,
    reward_model: bool,
    watches: bool,
) -> None:
    """Queue a job."""
    wanted = _job(draft, mixed, full=full, reward_model=reward_model)
    created = session.client.jobs.create(wanted, job_id=name)
    if watches:
        _watch(session, created.name)
        return
    session.show(created, _facts)
    session.hint(f"jobs watch {short(created.name)}")


@jobs.command("list")
@pass_session
def list_jobs(session: Session) -> None:
    """List the jobs, newest first."""
    session.show_list(session.client.jobs.list(), _table)


@jobs.command()
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show a job."""
    session.show(session.client.jobs.get(name), _facts)


@jobs.command()
@click.argument("name")
@pass_session
def watch(session: Session, name: str) -> None:
    """Watch a job until it is done: step, loss, tokens per second, time left. Exit code 6 when it fails."""
    _watch(session, name)


def _watch(session: Session, name: str) -> None:
    from luthier.client.cli.following import watch as watch_resource

    done = watch_resource(session, name, session.client.jobs.wait, stop=f"jobs cancel {short(name)}")
    if not session.as_json:
        session.show(done, _facts)
        if done.HasField("reward_model"):
            session.hint(f"models download {short(done.tuned_model)}")
            return
        # Arms share their base weights: one that has its own is evaluated by itself.
        base = "" if done.HasField("full") else f" --arm base={short(done.base_model)}:3"
        session.hint(
            f"evaluations create --version DATASET/VERSION{base} --arm tuned={short(done.tuned_model)}"
        )


@jobs.command()
@click.argument("name")
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask a job to stop; it does within one forward and backward pass. Its checkpoints remain."""
    session.show(session.client.jobs.cancel(name), _facts)


@jobs.command()
@pass_deletion
def delete(session: Session, name: str, etag: str) -> None:
    """Delete a job that has ended. Its model stays."""
    session.show_deleted(session.client.jobs.delete(name, etag=etag))


@jobs.command()
@click.argument("name")
@pass_session
def metrics(session: Session, name: str) -> None:
    """Show a job's metrics by step."""
    session.show_list(session.client.jobs.metrics(name, page_size=1000), _metric_table)


@jobs.command()
@click.argument("name")
@pass_session
def checkpoints(session: Session, name: str) -> None:
    """List a job's checkpoints, in order of steps."""
    session.show_list(session.client.jobs.checkpoints(name), _checkpoint_table)


def _table(jobs: Iterable[FineTuningJob]) -> Table:
    from luthier.client.cli.views import state, table, when

    made = table("NAME", "STATE", "BASE MODEL", "RENDERING", "#DONE", "CREATED (UTC)")
    for job in jobs:
        done = f"{job.progress.completed}/{job.progress.total}" if job.progress.total else ""
        made.add_row(
            short(job.name),
            state(job),
            short(job.base_model),
            short(job.rendering),
            done,
            when(job.create_time),
        )
    return made


def _metric_table(points: Iterable[MetricPoint]) -> Table:
    from luthier.client.cli.views import table

    kept = list(points)
    keys = sorted({key for point in kept for key in point.values})
    made = table("#STEP", *(f"#{key.upper()}" for key in keys))
    for point in kept:
        made.add_row(
            str(point.step), *(f"{point.values[key]:.5g}" if key in point.values else "" for key in keys)
        )
    return made


def _checkpoint_table(checkpoints: Iterable[Checkpoint]) -> Table:
    from luthier.client.cli.views import mapping, size, table, when

    made = table("NAME", "#STEP", "#ATTEMPT", "#SIZE", "METRICS", "CREATED (UTC)")
    for point in checkpoints:
        made.add_row(
            short(point.name),
            str(point.step),
            str(point.attempt),
            size(point.size_bytes),
            mapping(point.metrics),
            when(point.create_time),
        )
    return made


def _facts(job: FineTuningJob) -> Table:
    from luthier.client.cli.views import facts, failure, mapping, state, when

    progress = (
        f"{job.progress.completed}/{job.progress.total} {job.progress.unit}" if job.progress.total else ""
    )
    record = job.run_record
    return facts(
        [
            ("job", short(job.name)),
            ("state", state(job)),
            ("failure", failure(job)),
            ("base model", short(job.base_model)),
            ("begins from", short(job.start_from)),
            ("method", _method(job)),
            ("trains", "all weights" if job.HasField("full") else f"an adapter of rank {job.lora.rank}"),
            ("rendering", short(job.rendering)),
            ("mixed", ", ".join(f"{short(one.rendering)} {one.share:.0%}" for one in job.mixed_renderings)),
            ("tuned model", short(job.tuned_model)),
            ("progress", progress),
            ("metrics", mapping(job.latest_metrics)),
            ("attempts", job.num_attempts),
            ("device", record.device),
            ("kernels", mapping(record.kernels)),
            ("started (UTC)", when(job.start_time)),
            ("ended (UTC)", when(job.end_time)),
            ("labels", mapping(job.labels)),
        ]
    )


def _method(job: FineTuningJob) -> str:
    from luthier.v1.fine_tuning_job_pb2 import PreferenceConfig

    if not job.HasField("preference"):
        return (job.WhichOneof("method") or "supervised").replace("_", " ")
    return f"preference, {PreferenceConfig.Loss.Name(job.preference.loss).removeprefix('LOSS_').lower()}"
