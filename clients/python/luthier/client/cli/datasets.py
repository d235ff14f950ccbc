"""`luthier datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.deleting import Deletable, add_deleting, deleted_option
from luthier.client.cli.drafts import Draft, field_option, pass_draft
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from luthier.v1.dataset_pb2 import DatasetVersion
    from luthier.v1.upload_pb2 import Upload

_SPLITS = click.Choice(["train", "validation", "test"])


@click.group(cls=SuggestingGroup)
def datasets() -> None:
    """Upload examples, check and split them, look at the records.

    A version's short name is DATASET/VERSION.
    """


def _kind() -> type[DatasetVersion]:
    from luthier.v1.dataset_pb2 import DatasetVersion

    return DatasetVersion


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
@field_option(
    "--validation",
    field="split_settings.validation_fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of records for validation.",
)
@field_option(
    "--test",
    field="split_settings.test_fraction",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of records for the test.",
)
@field_option("--seed", field="split_settings.seed", type=int, help="Seed of the split.")
@field_option(
    "--policy",
    field="invalid_record_policy",
    type=click.Choice(["strict", "skip"]),
    default="strict",
    help="What a bad record does. [default: strict]",
)
@click.option(
    "--resume", multiple=True, metavar="UPLOAD", help="An upload that was broken off, to go on with."
)
@pass_session
@pass_draft(_kind)
def create(
    session: Session,
    draft: Draft[DatasetVersion],
    files: tuple[Path, ...],
    name: str | None,
    placed: tuple[str, ...],
    resume: tuple[str, ...],
) -> None:
    """Upload FILES and build a version: checked, without duplicates, split.

    Formats, which are detected and shown: OpenAI chat, prompt-completion, Alpaca, ShareGPT, question-answer; preference
    pairs of OpenAI, TRL and LLaMA-Factory; answers with a label of TRL and LLaMA-Factory; as JSONL or JSON. FILES take
    the place of the `sources` in -f FILE, which are uploads that are complete.
    """
    paths = _take_files(draft.message, [*((path, "") for path in files), *map(_placed, placed)])
    wanted = draft.finish()
    if not wanted.sources:
        raise click.UsageError("give at least one file, or --split SPLIT=FILE, or sources in -f FILE")
    if [source.filename for source in wanted.sources[: len(paths)]] != [str(path) for path in paths]:
        raise click.UsageError("--set sources=... leaves out the files that are given: give one of them")
    if name is None and not paths:
        raise click.UsageError(
            "Missing option '--name', as no file is given that a dataset could be called by"
        )
    dataset = _dataset_id(session, name or _id_from(paths[0]))
    begun = _resumable(session, resume)
    for path, source in zip(paths, wanted.sources, strict=False):
        source.upload, source.filename = _upload(session, path, begun), ""
    _finish(session, session.client.datasets.create_version(dataset, settings=wanted))


def _take_files(version: DatasetVersion, placed: list[tuple[Path, str]]) -> list[Path]:
    """Make files the sources of a version, if there are any: `filename` is the path until the file is uploaded."""
    from luthier.v1.dataset_pb2 import SPLIT_UNSPECIFIED, Split

    if placed:
        del version.sources[:]
    for path, split in placed:
        wanted = Split.Value(f"SPLIT_{split.upper()}") if split else SPLIT_UNSPECIFIED
        version.sources.add(filename=str(path), split=wanted)
    return [path for path, _ in placed]


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


def _upload(session: Session, path: Path, resume: dict[str, Upload]) -> str:
    """Upload a file and return the upload's name."""
    from luthier.client.cli.live import transfer
    from luthier.client.transfers import TransferProgress

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
    return upload.name


def _finish(session: Session, started: DatasetVersion) -> None:
    from luthier.client.cli.following import follow
    from luthier.client.cli.views import error_table, version_facts
    from luthier.client.failures import VersionFailed

    try:
        stop = f"datasets cancel {short(started.name)}"
        version = follow(session, started.name, session.client.datasets.versions.wait, stop=stop)
    except VersionFailed:
        errors = list(session.client.datasets.versions.errors(started.name))
        if errors and not session.for_programs:
            session.err.print(error_table(errors[:20]))
            if len(errors) > 20:
                session.note(f"... and more: luthier datasets errors {short(started.name)}")
        raise
    session.show(version, version_facts)
    if version.statistics.num_invalid:
        session.hint(f"datasets errors {short(version.name)}")
    session.hint(f"renderings create {short(version.name)} --model MODEL")


@datasets.command("list")
@click.argument("dataset", required=False, shell_complete=complete_names)
@deleted_option
@pass_session
def list_datasets(session: Session, dataset: str | None, deleted: bool) -> None:
    """List the datasets, or the versions of DATASET; newest first."""
    from luthier.client.cli.views import dataset_table, version_table

    if dataset:
        session.show_list(session.client.datasets.versions.list(dataset, show_deleted=deleted), version_table)
    else:
        session.show_list(session.client.datasets.list(show_deleted=deleted), dataset_table)


@datasets.command()
@click.argument("upload", required=False)
@click.option(
    "--state",
    type=click.Choice(["receiving", "complete", "cancelled"]),
    help="Only uploads of this state: those that are receiving can be gone on with (create --resume UPLOAD).",
)
@pass_session
def uploads(session: Session, upload: str | None, state: str | None) -> None:
    """List the uploads of the project, newest first, or show UPLOAD."""
    from luthier.client.cli.views import upload_facts, upload_table

    if upload is None:
        wanted = f'state = "{state.upper()}"' if state else ""
        session.show_list(session.client.datasets.list_uploads(filter=wanted), upload_table)
    elif state is not None:
        raise click.UsageError("--state is for the list of uploads: leave out UPLOAD")
    else:
        session.show(session.client.datasets.get_upload(upload), upload_facts)


@datasets.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show a version (DATASET/VERSION) with its statistics, or the versions of a dataset."""
    from luthier.client.cli.views import version_facts, version_table

    if _is_version(name):
        session.show(session.client.datasets.versions.get(name), version_facts)
        return
    dataset = session.client.datasets.get(name)
    if session.for_programs:
        session.show(dataset, version_table)
        return
    session.show_list(session.client.datasets.versions.list(dataset.name), version_table)


def _is_version(name: str) -> bool:
    return "/versions/" in name or (name.count("/") == 1 and not name.startswith("projects/"))


@datasets.command()
@click.argument("version", shell_complete=complete_names)
@pass_session
def cancel(session: Session, version: str) -> None:
    """Ask VERSION, one that is being built, to stop."""
    from luthier.client.cli.views import version_facts

    session.show(session.client.datasets.versions.cancel(version), version_facts)


def _deletable(session: Session, name: str) -> Deletable:
    return session.client.datasets.versions if _is_version(name) else session.client.datasets


add_deleting(datasets, _deletable, "Delete a version (DATASET/VERSION), or a dataset that has none.")


@datasets.command()
@click.argument("version", shell_complete=complete_names)
@pass_session
def errors(session: Session, version: str) -> None:
    """List the bad records of VERSION: file and line, path into the record, reason."""
    from luthier.client.cli.views import error_table

    session.show_list(session.client.datasets.versions.errors(version), error_table)


@datasets.command()
@click.argument("version", shell_complete=complete_names)
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
