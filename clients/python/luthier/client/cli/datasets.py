"""`luthier datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import DatasetSource, DatasetVersion
    from luthier.v1.upload_pb2 import Upload

_SPLITS = click.Choice(["train", "validation", "test"])


@click.group(cls=SuggestingGroup)
def datasets() -> None:
    """Upload examples, check and split them, look at the records.

    A version's short name is DATASET/VERSION.
    """


@datasets.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Id of the dataset; made when it does not exist. [default: from the first file]")
@click.option(
    "--split",
    "placed",
    multiple=True,
    metavar="SPLIT=FILE",
    help="A file whose records all belong to one split.",
)
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="Share of records for validation.",
)
@click.option(
    "--test", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Share of records for the test."
)
@click.option("--seed", type=int, default=0, help="Seed of the split.")
@click.option(
    "--policy",
    type=click.Choice(["strict", "skip"]),
    default="strict",
    help="What a bad record does. [default: strict]",
)
@click.option(
    "--resume", multiple=True, metavar="UPLOAD", help="An upload that was broken off, to go on with."
)
@pass_session
def create(
    session: Session, files: tuple[Path, ...], name: str | None, placed: tuple[str, ...], **settings: object
) -> None:
    """Upload FILES and build a version: checked, without duplicates, split.

    Formats: OpenAI chat, prompt-completion, Alpaca; as JSONL or JSON.
    """
    sources = [(path, "") for path in files] + [_placed(text) for text in placed]
    if not sources:
        raise click.UsageError("give at least one file, or --split SPLIT=FILE")
    dataset = _dataset_id(session, name or _id_from(sources[0][0]))
    resume = _resumable(session, settings["resume"])  # type: ignore[arg-type]
    uploaded = [_upload(session, path, split, resume) for path, split in sources]
    started = session.client.datasets.create_version(dataset, uploaded, settings=_settings(settings))
    _finish(session, started)


def _placed(text: str) -> tuple[Path, str]:
    split, equals, file = text.partition("=")
    if not equals or split not in _SPLITS.choices:
        raise click.BadParameter(
            f"must be train=FILE, validation=FILE or test=FILE, got {text!r}", param_hint="--split"
        )
    path = Path(file)
    if not path.is_file():
        raise click.BadParameter(f"file {file!r} does not exist", param_hint="--split")
    return path, split


def _id_from(path: Path) -> str:
    letters = "".join(
        c if c.isascii() and c.isalnum() else "-" for c in path.name.split(".")[0].lower()
    ).strip("-")
    return letters[:63] if letters[:1].isalpha() else f"data-{letters}"[:63].rstrip("-")


def _dataset_id(session: Session, name: str) -> str:
    from luthier.errors import AlreadyExists

    try:
        return session.client.datasets.create(name).name
    except AlreadyExists:
        # A further version of a dataset that is there.
        return session.client.datasets.get(name).name


def _resumable(session: Session, names: tuple[str, ...]) -> dict[str, Upload]:
    uploads = [session.client.datasets.get_upload(name) for name in names]
    return {upload.filename: upload for upload in uploads}


def _upload(session: Session, path: Path, split: str, resume: dict[str, Upload]) -> DatasetSource:
    from luthier.client.cli.live import transfer
    from luthier.client.transfers import TransferProgress
    from luthier.v1.dataset_pb2 import SPLIT_UNSPECIFIED, DatasetSource, Split

    begun = resume.get(path.name)
    name = begun.name if begun else ""

    with transfer(session, f"upload {path.name}:") as show:

        def progress(now: TransferProgress) -> None:
            nonlocal name
            name = now.name
            show(now)

        try:
            upload = session.client.datasets.upload(
                path, resume=begun.name if begun else "", progress=progress
            )
        except BaseException:
            if name:
                session.note(f"the upload can be taken up again with --resume {short(name)}")
            raise
    wanted = Split.Value(f"SPLIT_{split.upper()}") if split else SPLIT_UNSPECIFIED
    return DatasetSource(upload=upload.name, split=wanted)


def _settings(settings: dict[str, object]) -> DatasetVersion:
    from luthier.v1.dataset_pb2 import DatasetVersion, InvalidRecordPolicy, SplitSettings

    return DatasetVersion(
        invalid_record_policy=InvalidRecordPolicy.Value(
            f"INVALID_RECORD_POLICY_{str(settings['policy']).upper()}"
        ),
        split_settings=SplitSettings(
            validation_fraction=settings["validation"],  # type: ignore[arg-type]
            test_fraction=settings["test"],  # type: ignore[arg-type]
            seed=settings["seed"],  # type: ignore[arg-type]
        ),
    )


def _finish(session: Session, started: DatasetVersion) -> None:
    from luthier.client.cli.following import follow
    from luthier.client.cli.views import error_table, version_facts
    from luthier.client.failures import VersionFailed

    try:
        stop = f"datasets cancel {short(started.name)}"
        version = follow(session, started.name, session.client.datasets.versions.wait, stop=stop)
    except VersionFailed:
        errors = list(session.client.datasets.versions.errors(started.name))
        if errors and not session.as_json:
            session.err.print(error_table(errors[:20]))
            if len(errors) > 20:
                session.note(f"... and more: luthier datasets errors {short(started.name)}")
        raise
    session.show(version, version_facts)
    if version.statistics.num_invalid:
        session.hint(f"datasets errors {short(version.name)}")
    session.hint(f"renderings create {short(version.name)} --model MODEL")


@datasets.command("list")
@click.argument("dataset", required=False)
@pass_session
def list_datasets(session: Session, dataset: str | None) -> None:
    """List the datasets, or the versions of DATASET; newest first."""
    from luthier.client.cli.views import dataset_table, version_table

    if dataset:
        session.show_list(session.client.datasets.versions.list(dataset), version_table)
    else:
        session.show_list(session.client.datasets.list(), dataset_table)


@datasets.command()
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show a version (DATASET/VERSION) with its statistics, or the versions of a dataset."""
    from luthier.client.cli.views import version_facts, version_table

    if "/versions/" in name or (name.count("/") == 1 and not name.startswith("projects/")):
        session.show(session.client.datasets.versions.get(name), version_facts)
        return
    dataset = session.client.datasets.get(name)
    if session.as_json:
        session.show(dataset, version_table)
        return
    session.show_list(session.client.datasets.versions.list(dataset.name), version_table)


@datasets.command()
@click.argument("version")
@pass_session
def cancel(session: Session, version: str) -> None:
    """Ask VERSION, one that is being built, to stop."""
    from luthier.client.cli.views import version_facts

    session.show(session.client.datasets.versions.cancel(version), version_facts)


@datasets.command()
@click.argument("version")
@pass_session
def errors(session: Session, version: str) -> None:
    """List the bad records of VERSION: file and line, path into the record, reason."""
    from luthier.client.cli.views import error_table

    session.show_list(session.client.datasets.versions.errors(version), error_table)


@datasets.command()
@click.argument("version")
@click.option("--split", type=_SPLITS, help="Only records of this split.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Records to show.")
@pass_session
def records(session: Session, version: str, split: str | None, limit: int) -> None:
    """Show records of VERSION, a READY one."""
    from itertools import islice

    from luthier.client.cli.views import record_table
    from luthier.v1.dataset_pb2 import SPLIT_UNSPECIFIED, Split

    wanted = Split.Value(f"SPLIT_{split.upper()}") if split else SPLIT_UNSPECIFIED
    found = session.client.datasets.versions.records(version, split=wanted, page_size=min(limit, 1000))
    session.show_list(islice(found, limit), record_table)
