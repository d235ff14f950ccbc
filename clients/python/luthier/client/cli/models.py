"""`luthier models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.client.cli.completing import complete_names
from luthier.client.cli.deleting import add_deleting, deleted_option
from luthier.client.cli.groups import SuggestingGroup
from luthier.client.cli.session import Session, pass_session
from luthier.client.names import short

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.client.models import ExportFormat
    from luthier.v1.model_pb2 import Model

_GGUF: Mapping[str, ExportFormat] = {"gguf-q8_0": "gguf-q8_0", "gguf-f16": "gguf-f16"}


@click.group(cls=SuggestingGroup)
def models() -> None:
    """Register base models; merge, export, list and download models."""


@models.command()
@click.argument("name", shell_complete=complete_names)
@click.option("--gguf", metavar="FILE", help="A GGUF file on the worker's machine.")
@click.option("--directory", metavar="DIR", help="A folder in transformers' layout on the worker's machine.")
@click.option("--hub", metavar="REPO[@REVISION]", help="A repository of the Hugging Face Hub.")
@pass_session
def register(session: Session, name: str, gguf: str | None, directory: str | None, hub: str | None) -> None:
    """Take in a base model under NAME, from one source."""
    from luthier.client.cli.following import follow
    from luthier.v1.model_pb2 import HubSource, Model

    if sum(source is not None for source in (gguf, directory, hub)) != 1:
        raise click.UsageError("give exactly one of --gguf, --directory and --hub")
    repo, _, revision = (hub or "").partition("@")
    source = Model(hub=HubSource(repo_id=repo, revision=revision)) if hub else Model()
    # Relative paths would be read from the worker's folder, not from where the person is.
    if gguf:
        source.gguf_path = str(Path(gguf).absolute())
    if directory:
        source.directory = str(Path(directory).absolute())
    started = session.client.models.register_base(source, model_id=name)
    stop = f"models cancel {short(started.name)}"
    done = follow(session, started.name, session.client.models.wait, stop=stop)
    session.show(done, _facts)
    session.hint(f"renderings create DATASET/VERSION --model {short(done.name)}")


@models.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("new", required=False, default="")
@pass_session
def merge(session: Session, name: str, new: str) -> None:
    """Make a model with all its weights from the adapter NAME, or a checkpoint JOB/step-N, under the name NEW."""
    started = session.client.models.merge(name, model_id=new)
    done = _made(session, started)
    session.show(done, _facts)
    session.hint(f"models download {short(done.name)} DIRECTORY")


@models.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--format",
    "chosen",
    type=click.Choice([*_GGUF, "safetensors", "peft"]),
    default="gguf-q8_0",
    show_default=True,
    help="GGUF in 8 or 16 bits, all weights as transformers has them, or an adapter as PEFT has it.",
)
@pass_session
def export(session: Session, name: str, directory: Path, chosen: str) -> None:
    """Write the model, adapter or checkpoint NAME in a form for other programs, and bring it into DIRECTORY."""
    source = session.client.models.get(name)
    if chosen == "peft" and not source.base_model:
        raise click.UsageError(f"--format peft is for adapters; {short(source.name)} has all its weights")
    if chosen == "safetensors" and source.base_model:
        source = _made(session, session.client.models.merge(name))
    elif chosen in _GGUF:
        source = _made(session, session.client.models.export(name, _GGUF[chosen]))
    session.show(source, _facts)
    _bring(session, source.name, directory)


def _made(session: Session, started: Model) -> Model:
    """Return a model that is made from another one, once it is READY."""
    from luthier.client.cli.following import follow

    stop = f"models cancel {short(started.name)}"
    return follow(session, started.name, session.client.models.wait, stop=stop)


@models.command("list")
@deleted_option
@pass_session
def list_models(session: Session, deleted: bool) -> None:
    """List the models, newest first."""
    session.show_list(session.client.models.list(show_deleted=deleted), _table)


@models.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def show(session: Session, name: str) -> None:
    """Show a model."""
    session.show(session.client.models.get(name), _facts)


@models.command()
@click.argument("name", shell_complete=complete_names)
@pass_session
def cancel(session: Session, name: str) -> None:
    """Ask a model that is being registered, merged or exported to stop."""
    session.show(session.client.models.cancel(name), _facts)


add_deleting(models, lambda session, _: session.client.models, "Delete a model that nothing stands on.")


@models.command()
@click.argument("name", shell_complete=complete_names)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--base",
    metavar="FOLDER|HUB-ID",
    help="What PEFT is to load an adapter's base model from. [default: the Hub, if it is from there]",
)
@pass_session
def download(session: Session, name: str, directory: Path, base: str | None) -> None:
    """Bring the files of model NAME into DIRECTORY, for `from_pretrained` or PEFT.

    Repeat the command after a break.
    """
    folder = _bring(session, name, directory, base)
    if session.for_programs:
        session.show_list(session.client.models.files(name), _table)
    else:
        click.echo(folder)


def _bring(session: Session, name: str, directory: Path, base: str | None = None) -> Path:
    """Download a model and return its folder."""
    from luthier.client.adapter_base import unplaced
    from luthier.client.cli.live import transfer

    with transfer(session, "download") as progress:
        folder: Path = session.client.models.download(name, directory, base=base, progress=progress)
    if unplaced_base := unplaced(folder):
        wanted = short(unplaced_base)
        session.note(
            f"{folder} is an adapter whose base model {wanted} was not registered from the Hub, so PEFT does not "
            f"find it: bring it too (luthier models download {wanted} BASE), and this into a new folder "
            f"(luthier models download {short(name)} DIRECTORY --base BASE)"
        )
    return folder


def _table(models: Iterable[Model]) -> Table:
    from luthier.client.cli.views import number, state, table, when
    from luthier.v1.model_pb2 import Model

    made = table("NAME", "STATE", "KIND", "BASE MODEL", "#PARAMETERS", "CREATED (UTC)")
    for model in models:
        made.add_row(
            short(model.name),
            state(model),
            Model.Kind.Name(model.kind).removeprefix("KIND_").lower(),
            short(model.base_model),
            number(model.num_parameters),
            when(model.create_time),
        )
    return made


def _facts(model: Model) -> Table:
    from luthier.client.cli.views import facts, failure, mapping, number, precision, state, waiting
    from luthier.v1.model_pb2 import Model

    source = model.WhichOneof("source")
    hub = f"{model.hub.repo_id}@{model.hub.revision or 'main'}"
    return facts(
        [
            ("model", short(model.name)),
            ("state", state(model)),
            ("failure", failure(model)),
            ("waiting", waiting(model)),
            ("kind", Model.Kind.Name(model.kind).removeprefix("KIND_").lower()),
            ("source", "" if source is None else hub if source == "hub" else getattr(model, source)),
            ("base model", short(model.base_model)),
            ("base precision", precision(model.base_precision)),
            ("begins from", short(model.start_from)),
            ("job", short(model.fine_tuning_job)),
            ("step", model.step),
            ("taught by", short(model.taught.rendering)),
            ("taught on", model.taught.template_date),
            ("architecture", model.architecture),
            ("parameters", number(model.num_parameters) if model.num_parameters else ""),
            ("context", f"{number(model.context_length)} tokens" if model.context_length else ""),
            ("digest", model.digest),
            ("compared", _compared(model)),
            ("warnings", "\n".join(model.warnings)),
            ("labels", mapping(model.labels)),
        ]
    )


def _compared(model: Model) -> str:
    """Say how a model that was made from another one differs from that; empty for others."""
    from luthier.client.cli.views import precision

    if not model.HasField("check"):
        return ""
    check = model.check
    told = [f"logits differ by {check.difference:.2g} of their spread (at most {check.bound:g})"]
    if check.effect:
        told.append(f"what was learnt moves them by {check.effect:.2g}")
    if check.base_difference:
        held = precision(check.base_precision)
        told.append(f"made on the base in {held}, which moves the base's own by {check.base_difference:.2g}")
    told.append(f"{check.num_equal_greedy_tokens} of {check.num_greedy_tokens} greedy tokens are the same")
    return "\n".join(told)
