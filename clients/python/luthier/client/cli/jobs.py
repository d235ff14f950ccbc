"""`luthier jobs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

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
    click.option("--model", required=True, help="Base model to tune."),
    click.option("--rendering", required=True, help="Rendering to train on."),
    click.option("--rank", type=int, help="Rank of the adapter. [default: 16]"),
    click.option("--alpha", type=float, help="Scale of the adapter is alpha / rank. [default: 2 x rank]"),
    click.option(
        "--target", "targets", multiple=True, help="Linear module to adapt. [default: all but the head]"
    ),
    click.option("--epochs", type=int, default=0, help="Passes over the rows. [default: 1]"),
    click.option("--max-steps", type=int, default=0, help="Optimiser steps at most."),
    click.option("--batch-tokens", type=int, help="Tokens in a step. [default: 4096]"),
    click.option("--batch-rows", type=int, help="Rows in a step, in place of --batch-tokens."),
    click.option("--learning-rate", type=float, help="Peak learning rate. [default: 2e-4]"),
    click.option("--warmup-steps", type=int, default=0, help="Steps to rise to it. [default: 0]"),
    click.option(
        "--schedule", type=click.Choice(["constant", "linear", "cosine"]), help="After it. [default: cosine]"
    ),
    click.option("--seed", type=int, default=0, help="Seed of the run. [default: 0]"),
    click.option(
        "--checkpoint-interval", type=int, default=0, help="Steps between checkpoints. [default: 25]"
    ),
    click.option(
        "--max-checkpoints", type=int, default=0, help="Checkpoints kept besides the best. [default: 3]"
    ),
    click.option(
        "--validation-interval", type=int, default=0, help="Steps between validations. [default: an epoch]"
    ),
)


def _job_options(function: F) -> F:
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return function


def _job(given: dict[str, Any]) -> FineTuningJob:
    from luthier.v1.fine_tuning_job_pb2 import (
        FineTuningJob,
        Hyperparameters,
        LearningRateSchedule,
        LoraConfig,
    )

    if given["batch_tokens"] is not None and given["batch_rows"] is not None:
        raise click.UsageError("give one of --batch-tokens and --batch-rows")
    settings = Hyperparameters(
        num_epochs=given["epochs"],
        max_steps=given["max_steps"],
        learning_rate=given["learning_rate"],
        warmup_steps=given["warmup_steps"],
        seed=given["seed"],
    )
    if given["batch_tokens"] is not None:
        settings.batch_tokens = given["batch_tokens"]
    if given["batch_rows"] is not None:
        settings.batch_rows = given["batch_rows"]
    if given["schedule"]:
        settings.learning_rate_schedule = LearningRateSchedule.Value(
            f"LEARNING_RATE_SCHEDULE_{given['schedule'].upper()}"
        )
    return FineTuningJob(
        base_model=given["model"],
        rendering=given["rendering"],
        lora=LoraConfig(rank=given["rank"], alpha=given["alpha"], target_modules=given["targets"]),
        hyperparameters=settings,
        checkpoint_interval_steps=given["checkpoint_interval"],
        max_checkpoints=given["max_checkpoints"],
        validation_interval_steps=given["validation_interval"],
    )


@jobs.command()
@_job_options
@pass_session
def plan(session: Session, **given: Any) -> None:
    """Say what a job would do, without starting it."""
    from luthier.client.cli.views import plan_facts

    session.show(session.client.jobs.plan(_job(given)), plan_facts)
    session.hint(f"jobs create --model {given['model']} --rendering {given['rendering']}")


@jobs.command()
@_job_options
@click.option("--name", default="", help="Id of the job. [default: made by the service]")
@click.option("--tuned-model", default="", help="Id of the tuned model. [default: the job's]")
@click.option("--watch", "watches", is_flag=True, help="Watch the job until it is done.")
@pass_session
def create(session: Session, name: str, tuned_model: str, watches: bool, **given: Any) -> None:
    """Queue a job."""
    job = _job(given)
    job.tuned_model_id = tuned_model
    created = session.client.jobs.create(job, job_id=name)
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
        session.hint(
            f"evaluations create --version DATASET/VERSION --arm base={short(done.base_model)}:3"
            f" --arm tuned={short(done.tuned_model)}"
        )


@jobs.command()
@click.argument("name")
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask a job to stop; it does within one forward and backward pass. Its checkpoints remain."""
    session.show(session.client.jobs.cancel(name), _facts)


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
            ("rendering", short(job.rendering)),
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
