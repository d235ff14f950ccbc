"""`luthier jobs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.curves import learning_curve
from luthier.client.cli.deleting import add_deleting, deleted_option
from luthier.client.cli.drafts import Draft, field_option, pass_draft
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.job_drafts import drafted_job, job_kind, job_options
from luthier.client.cli.logs import logs
from luthier.client.cli.opening import open_job
from luthier.client.cli.reinforcement import rollouts
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob, MetricPoint, RunRecord


@click.group(cls=SuggestingGroup)
def jobs() -> None:
    """Plan, start, watch, pause and cancel fine-tuning jobs."""


for command in (rollouts, logs, open_job, learning_curve):
    jobs.add_command(command)


@jobs.command()
@job_options
@click.option(
    "--device", default="", help="Where: cpu or gpu, then GiB of memory and TFLOP/s, as gpu:80:989."
)
@pass_session
@pass_draft(job_kind)
def plan(
    session: Session,
    draft: Draft[FineTuningJob],
    reinforcement: str | None,
    *,
    full: bool,
    reward_model: bool,
    device: str,
) -> None:
    """Say what a job would do and what memory and time it takes, without starting it."""
    from luthier.client.cli.devices import device_class
    from luthier.client.cli.views import plan_facts

    job = drafted_job(draft, reinforcement, full=full, reward_model=reward_model)
    session.show(session.client.jobs.plan(job, device=device_class(device)), plan_facts)
    session.hint(f"jobs create {draft.words}")


@jobs.command()
@job_options
@click.option("--name", default="", help="Id of the job. [default: made by the service]")
@field_option("--tuned-model", field="tuned_model_id", help="Id of the tuned model. [default: the job's]")
@click.option("--watch", "watches", is_flag=True, help="Watch the job until it is done.")
@pass_session
@pass_draft(job_kind)
def create(
    session: Session,
    draft: Draft[FineTuningJob],
    name: str,
    reinforcement: str | None,
    *,
    full: bool,
    reward_model: bool,
    watches: bool,
) -> None:
    """Queue a job."""
    job = drafted_job(draft, reinforcement, full=full, reward_model=reward_model)
    created = session.client.jobs.create(job, job_id=name)
    if watches:
        _watch(session, created.name)
        return
    session.show(created, partial(_facts, is_wide=session.is_wide))
    session.hint(f"jobs watch {short(created.name)}")


@jobs.command("list")
@deleted_option
@pass_session
def list_jobs(session: Session, deleted: bool) -> None:
    """List the jobs, newest first."""
    session.show_list(session.client.jobs.list(show_deleted=deleted), _table)


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show a job."""
    session.show(session.client.jobs.get(name), partial(_facts, is_wide=session.is_wide))


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@click.option(
    "--chart/--no-chart", default=True, show_default=True, help="Draw the loss, or the reward, on a terminal."
)
@pass_session
def watch(session: Session, name: str, chart: bool) -> None:
    """Watch a job until it is done: step, loss, tokens per second, time left. Exit code 6 when it fails."""
    _watch(session, name, chart)


def _watch(session: Session, name: str, chart: bool = True) -> None:
    from luthier.client.cli.following import watch as watch_resource

    stop = f"jobs cancel {short(name)}"
    done = watch_resource(session, name, session.client.jobs.wait, stop=stop, chart=chart)
    if session.form == "name":
        session.show(done, partial(_facts, is_wide=False))
    if not session.for_programs:
        session.show(done, partial(_facts, is_wide=session.is_wide))
        if done.HasField("reward_model"):
            session.hint(f"models download {short(done.tuned_model)}")
            return
        # Arms share their base weights: one that has its own is evaluated by itself.
        base = "" if done.HasField("full") else f" --arm base={short(done.base_model)}:3"
        session.hint(
            f"evaluations create --version DATASET/VERSION{base} --arm tuned={short(done.tuned_model)}"
        )


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask a job to stop; it does within one forward and backward pass. Its checkpoints remain."""
    session.show(session.client.jobs.cancel(name), partial(_facts, is_wide=session.is_wide))


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def pause(session: Session, name: str) -> None:
    """Ask a job to pause: its worker ends the step, stores a checkpoint and is free for others."""
    paused = session.client.jobs.pause(name)
    session.show(paused, partial(_facts, is_wide=session.is_wide))
    session.hint(f"jobs resume {short(paused.name)}")


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def resume(session: Session, name: str) -> None:
    """Queue a paused job again; it goes on from its last checkpoint.

    On a like worker with as many ranks it ends as if it had never paused; else its run record says BEST_EFFORT.
    """
    resumed = session.client.jobs.resume(name)
    session.show(resumed, partial(_facts, is_wide=session.is_wide))
    session.hint(f"jobs watch {short(resumed.name)}")


add_deleting(jobs, lambda session, _: session.client.jobs, "Delete a job that has ended. Its model stays.")


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def metrics(session: Session, name: str) -> None:
    """Show a job's metrics by step."""
    session.show_list(session.client.jobs.metrics(name, page_size=1000), _metric_table)


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@pass_session
def tensorboard(session: Session, name: str, directory: Path) -> None:
    """Write a job's metrics and settings into DIRECTORY, for `tensorboard --logdir`."""
    from luthier.client.run_files import write_tensorboard

    points = session.client.jobs.metrics(name, page_size=1000)
    count = write_tensorboard(session.client.jobs.get(name), points, directory)
    session.note(f"{count:,} values")
    click.echo(directory)


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@pass_session
def mlflow(session: Session, name: str, directory: Path) -> None:
    """Add a job's metrics and settings as a run to the file store in DIRECTORY, for `mlflow ui`."""
    from luthier.client.run_files import write_mlflow

    points = session.client.jobs.metrics(name, page_size=1000)
    count = write_mlflow(session.client.jobs.get(name), points, directory)
    session.note(f"{count:,} values")
    click.echo(directory)


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def checkpoints(session: Session, name: str) -> None:
    """List a job's checkpoints, in order of steps."""
    session.show_list(session.client.jobs.checkpoints(name), _checkpoint_table)


@jobs.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def deliveries(session: Session, name: str) -> None:
    """Show what became of telling a job's webhooks that it has ended."""
    from luthier.client.cli.notifying import delivery_table

    session.show_list(session.client.jobs.deliveries(name), delivery_table)


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


def _facts(job: FineTuningJob, *, is_wide: bool) -> Table:
    from luthier.client.cli.views import (
        facts,
        failure,
        mapping,
        memory,
        passes,
        precision,
        state,
        waiting,
        when,
    )

    progress = (
        f"{job.progress.completed}/{job.progress.total} {job.progress.unit}" if job.progress.total else ""
    )
    record = job.run_record
    return facts(
        [
            ("job", short(job.name)),
            ("state", state(job)),
            ("failure", failure(job)),
            ("waiting", waiting(job)),
            ("base model", short(job.base_model)),
            ("begins from", short(job.start_from)),
            ("method", _method(job)),
            ("trains", _trained(job)),
            ("base precision", precision(job.base_precision)),
            ("rendering", short(job.rendering)),
            ("mixed", ", ".join(f"{short(one.rendering)} {one.share:.0%}" for one in job.mixed_renderings)),
            ("tuned model", short(job.tuned_model)),
            ("progress", progress),
            ("metrics", mapping(job.latest_metrics)),
            ("attempts", job.num_attempts),
            ("device", record.device),
            ("ranks", _ranks(record)),
            ("passes", passes(record.micro_batch_tokens, record.activation_checkpointing)),
            ("memory", memory(record.memory)),
            ("kernels", mapping(record.kernels) if is_wide else _kernels(record.kernels)),
            ("started (UTC)", when(job.start_time)),
            ("paused (UTC)", when(job.pause_time)),
            ("paused before", f"{job.paused_seconds:,.0f} s" if job.paused_seconds else ""),
            ("ended (UTC)", when(job.end_time)),
            ("labels", mapping(job.labels)),
            ("notifies", ", ".join(webhook.url for webhook in job.webhooks)),
        ]
    )


def _kernels(chosen: Mapping[str, str]) -> str:
    """Return how many operators each implementation has; which they are is told by `-o wide`."""
    counts = Counter(implementation.partition(" ")[0] for implementation in chosen.values())
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _ranks(record: RunRecord) -> str:
    """Return on how many ranks a job runs, if on several, and what each holds; empty before."""
    from luthier.v1.fine_tuning_job_pb2 import SHARDING_FSDP2

    held = "a part of the model" if record.sharding == SHARDING_FSDP2 else "the whole model"
    return f"{record.num_ranks}, each with {held}" if record.num_ranks > 1 else ""


def _trained(job: FineTuningJob) -> str:
    if job.HasField("full"):
        return "all weights"
    ranks = sorted({job.lora.rank, *job.lora.rank_pattern.values()})
    rank = f"{ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    return ", ".join([f"an adapter of rank {rank}", *job.lora.trained_modules])


def _method(job: FineTuningJob) -> str:
    from luthier.v1.fine_tuning_job_pb2 import PreferenceConfig

    if not job.HasField("preference"):
        return (job.WhichOneof("method") or "supervised").replace("_", " ")
    return f"preference, {PreferenceConfig.Loss.Name(job.preference.loss).removeprefix('LOSS_').lower()}"
