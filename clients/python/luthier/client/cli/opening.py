"""`open` of jobs and evaluations: their page in the browser."""

from __future__ import annotations

import re
from pathlib import Path

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short


@click.command("open")
@click.argument("name", shell_complete=complete_names)
@pass_session
def open_job(session: Session, name: str) -> None:
    """Open a job's page in the browser: its curves, what was asked for, and what ran, as it is now."""
    from luthier.client.report import TuningRun, render_run

    job = session.client.jobs.get(name)
    metrics = list(session.client.jobs.metrics(name, page_size=1000))
    _open(session, f"job-{short(job.name)}", render_run(TuningRun(job=job, metrics=metrics)))


@click.command("open")
@click.argument("name", shell_complete=complete_names)
@pass_session
def open_evaluation(session: Session, name: str) -> None:
    """Open an evaluation's report in the browser."""
    from luthier.client.report import collect_report, render_report

    data = collect_report(session.client, name)
    _open(session, f"evaluation-{short(data.evaluation.name)}", render_report(data))


def _open(session: Session, title: str, page: str) -> None:
    """Write a page where its user alone may read it, say where, and have the browser show it."""
    from luthier.client.config import environment

    cache = Path(environment().get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "luthier" / "pages"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = cache / f"{re.sub('[^a-z0-9-]', '-', title)}.html"
    path.write_text(page, encoding="utf-8")
    click.echo(path)
    if click.launch(path.as_uri()) != 0:
        session.note("no browser could be started; open the file yourself")
