"""The `luthierd` command: run Luthier's processes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from luthier.daemon.config import Config
from luthier.errors import FailedPrecondition, InvalidArgument
from luthier.runtime.clear_errors import clear_errors
from luthier.runtime.config import put, read
from luthier.runtime.home import keep_private, secure_home

SERVICES = ("data", "training", "evaluation")


@click.group()
def main() -> None:
    """Run Luthier: the Data, Training and Evaluation services and their workers."""
    keep_private()


@main.command()
@click.option("--workers/--no-workers", default=True, help="Also run one worker of each kind.")
def up(workers: bool) -> None:
    """Run the three services and one worker of each kind on this machine, until Ctrl-C."""
    with clear_errors():
        from luthier.daemon.supervisor import Program, Supervisor, run_until_stopped

        began = time.monotonic()
        config = read(Config, section="DAEMON")
        addresses = (config.data_address, config.training_address, config.evaluation_address)
        services = [
            Program(name=name, module=f"luthier.{name}", address=address)
            for name, address in zip(SERVICES, addresses, strict=True)
        ]
        helpers = [Program(name=f"{name}-worker", module=f"luthier.{name}.worker") for name in SERVICES]

        def ready() -> None:
            for program in services:
                _say(f"{program.name:<11}{program.address}  SERVING")
            _say(f"ready in {time.monotonic() - began:.1f} s, home {config.home}")

        for changed in secure_home(config.home):
            _say(f"warning: {changed}")
        with _only_one(config):
            supervisor = Supervisor(config.home / "logs", _say)
            asyncio.run(run_until_stopped(supervisor, services, helpers if workers else [], ready))
        _say("stopped")


@main.command()
@click.argument("service", type=click.Choice(SERVICES))
def serve(service: str) -> None:
    """Run one service in the foreground."""
    runpy.run_module(f"luthier.{service}", run_name="__main__", alter_sys=True)


@main.command()
@click.argument("service", type=click.Choice(SERVICES))
@click.option(
    "--device",
    metavar="DEVICE",
    help="What it computes on: auto, cpu, cuda, cuda:N, rocm, rocm:N. Wins over LUTHIER_WORKER_DEVICE. [default: auto]",
)
@click.option(
    "--executor", help="How a training worker runs a training: inline, torchrun or ray. [default: inline]"
)
@click.option(
    "--ranks", type=int, help="Ranks that torchrun has on this machine, ray on its cluster. [default: 1]"
)
@click.option(
    "--ray-address",
    metavar="HOST:PORT",
    help="The cluster of the executor ray; auto: the one that this machine is a node of. [default: auto]",
)
def worker(
    service: str, device: str | None, executor: str | None, ranks: int | None, ray_address: str | None
) -> None:
    """Run one worker of a service in the foreground."""
    if device is not None and service == "data":
        raise click.UsageError("--device is for training and evaluation workers: a data worker has no model")
    if {executor, ranks, ray_address} != {None} and service != "training":
        raise click.UsageError(
            f"--executor, --ranks and --ray-address are of training workers, not of {service} workers"
        )
    if ray_address is not None and executor not in (None, "ray"):
        raise click.UsageError(f"--ray-address is of the executor ray, not of {executor}")
    chosen = {
        "LUTHIER_WORKER_DEVICE": device,
        "LUTHIER_WORKER_EXECUTOR": executor,
        "LUTHIER_WORKER_RANKS": ranks,
        "LUTHIER_WORKER_RAY_ADDRESS": ray_address,
    }
    # As if it stood there: the worker, and what it starts, read one place.
    put({name: str(value) for name, value in chosen.items() if value is not None})
    runpy.run_module(f"luthier.{service}.worker", run_name="__main__", alter_sys=True)


@main.command(name="fetch-demo-model")
def fetch_demo_model() -> None:
    """Download the demo's base model (93 MB) and print the path of its GGUF file."""
    with clear_errors():
        from luthier.daemon.demo_model import MODEL_ID, fetch_demo_model

        path = fetch_demo_model(read(Config, section="DAEMON").home)
        print(path)
        _say(f"next: luthier models register {MODEL_ID} --gguf {path}")


@main.command(name="grant-key")
@click.argument("name")
@click.option(
    "--project", "projects", multiple=True, required=True, help="A project; '*' for all. Repeatable."
)
@click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    help="reader: read; generator: have models answer and answers graded; writer: create, change, delete. Repeatable.",
)
def grant_key(name: str, projects: tuple[str, ...], roles: tuple[str, ...]) -> None:
    """Print a new API key of some projects and roles; it is stored nowhere. NAME is how logs call it.

    Services know it once they have started again. Who deletes its entry in api-keys.toml of the home takes it back.
    """
    with clear_errors():
        from luthier.runtime import granted_keys

        print(granted_keys.grant_key(read(Config, section="DAEMON").home, name, projects, roles))


@main.command(name="webhook-secret")
@click.argument("url")
@click.option(
    "--project", default="default", show_default=True, help="Whose jobs and evaluations are told of."
)
def webhook_secret(url: str, project: str) -> None:
    """Print the secret by which the receiver at URL knows that a webhook is ours; it is the same for all its paths.

    Each project has its own there, so that none can sign for another.
    While the file webhook-secret of the home has several lines, each has one: all of them sign.
    """
    with clear_errors():
        from luthier.runtime.keys import read_or_create_key
        from luthier.runtime.names import PROJECT
        from luthier.work.webhooks.signing import SECRET_FILE, SECRET_KIND, secrets_of
        from luthier.work.webhooks.targets import target_of

        try:
            target = target_of(url)
        except ValueError as error:
            raise InvalidArgument(f"URL {error}") from error
        PROJECT.parse(f"projects/{project}", field="--project")
        path = read(Config, section="DAEMON").home / SECRET_FILE
        read_or_create_key(path, SECRET_KIND)
        for secret in secrets_of(path, target.origin, project):
            print(secret)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do for Luthier and what is wrong with it. Exit code 1: there is a problem."""
    with clear_errors():
        from luthier.daemon.doctor import examined

        config = read(Config, section="DAEMON")
        addresses = (config.data_address, config.training_address, config.evaluation_address)
        has_problem = False
        for found in examined(config.home, dict(zip(SERVICES, addresses, strict=True))):
            has_problem = has_problem or found.level == "problem"
            print(json.dumps(asdict(found)) if as_json else f"{found.level:<8} {found.what:<19} {found.text}")
    sys.exit(int(has_problem))


@main.command()
@click.option(
    "--service", "services", type=click.Choice(SERVICES), multiple=True, help="Those alone. [default: all]"
)
@click.option("--digests/--no-digests", default=True, help="Also read every byte and compare its digest.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def fsck(services: tuple[str, ...], digests: bool, as_json: bool) -> None:
    """Check that everything stored is there, whole and needed. Changes nothing; services may run meanwhile.

    Exit code 1: something is wrong, each on a line; 2: it cannot be checked.
    """
    with clear_errors(exit_code=2):
        from luthier.daemon.fsck import check, json_of, line_of

        home = read(Config, section="DAEMON").home

        async def told() -> bool:
            is_faulty = False
            async for found in check(home, services or SERVICES, reads=digests):
                is_faulty = is_faulty or found.fault is not None
                print(json.dumps(json_of(found)) if as_json else line_of(found), flush=True)
            return is_faulty

        is_faulty = asyncio.run(told())
    sys.exit(int(is_faulty))


@contextmanager
def _only_one(config: Config) -> Iterator[None]:
    """Hold the home's lock: two supervisors would fight over ports and databases."""
    path = config.home / "luthierd.lock"
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"luthierd (pid {file.read().strip()}) runs on {config.home} already; "
                "stop it, or set LUTHIER_HOME to another folder"
            ) from None
        # Over what is there: on a full disk others take the room of what is cut off.
        os.pwrite(file.fileno(), f"{os.getpid():<20}".encode(), 0)
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
