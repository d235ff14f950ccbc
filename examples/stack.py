"""What the examples share: services of their own, commands as a user types them, and what counts as proof."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from luthier.client import Client, ConfigArguments
from luthier.v1.evaluation_pb2 import VERDICT_BETTER, Comparison, Evaluation

MODEL = "smollm2-135m-instruct-q4"
BIN = Path(sys.executable).parent
START_SECONDS = 60.0
SplitT = TypeVar("SplitT", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What an example is run with: a terminal, a client, its folder, a word for names, and what is asked of it."""

    shell: Shell
    client: Client
    home: Path
    stamp: str
    is_fast: bool
    is_control: bool


def play(description: str, run: Callable[[Stage], bool], *, has_control: bool = True) -> int:
    """Run an example by its command line on services of its own; returns the exit status: 0 if it shows its point."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(control=False)
    parser.add_argument("--fast", action="store_true", help="a tiny budget; nothing is proven")
    if has_control:
        parser.add_argument("--control", action="store_true", help="without a signal; nothing may be learnt")
    parser.add_argument("--home", type=Path, default=Path(".demo"), help="state, kept for next time")
    arguments = parser.parse_args()
    began = time.monotonic()
    home = arguments.home.resolve()
    with services(home) as environment, Client(connection(environment, home)) as client:
        stage = Stage(
            shell=Shell(environment),
            client=client,
            home=home,
            stamp=time.strftime("%Y%m%d-%H%M%S"),
            is_fast=arguments.fast,
            is_control=arguments.control,
        )
        say("\n1  The base model (downloaded and registered once)")
        have_base_model(stage.shell, client)
        is_shown = run(stage)
    say(f"\n{time.monotonic() - began:.0f} s from start to verdict; every process is stopped.")
    return 0 if is_shown or arguments.fast else 1


class Shell:
    """Types commands: shows each, runs it, and stops the example when one fails."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def luthier(self, *words: str) -> None:
        """Run the client's command on the terminal."""
        self._run([str(BIN / "luthier"), *words], capture=False)

    def luthierd(self, *words: str) -> str:
        """Run the daemon's command and return what it prints."""
        return self._run([str(BIN / "luthierd"), *words], capture=True)

    def failing(self, *words: str) -> str:
        """Run the client's command, which has to fail, on the terminal; returns what it writes to standard error."""
        command = [str(BIN / "luthier"), *words]
        say(f"$ luthier {shlex.join(words)}")
        done = subprocess.run(command, env=self._environment, stderr=subprocess.PIPE, text=True, check=False)
        say(done.stderr.rstrip())
        if not done.returncode:
            sys.exit("the command had to fail, and did not")
        return done.stderr

    def _run(self, command: list[str], *, capture: bool) -> str:
        say(f"$ {Path(command[0]).name} {shlex.join(command[1:])}")
        stdout = subprocess.PIPE if capture else None
        done = subprocess.run(command, env=self._environment, stdout=stdout, text=True, check=False)
        if done.returncode:
            sys.exit(f"the command failed with status {done.returncode}")
        return done.stdout or ""


@contextmanager
def services(home: Path) -> Iterator[Mapping[str, str]]:
    """Run `luthierd up` for the length of a block; yields the environment that finds it."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    environment = {**clean, **settings_of(home)}
    say("$ luthierd up")
    log = home / "up.log"
    with log.open("w") as sink:
        process = subprocess.Popen([str(BIN / "luthierd"), "up"], env=environment, stderr=sink)
    try:
        await_ready(process, log)
        say(log.read_text().rstrip())
        yield environment
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def settings_of(home: Path) -> dict[str, str]:
    """Return the settings of a private stack: a home and free ports, so that it meets no other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    settings = {"LUTHIER_HOME": str(home)}
    for index, name in enumerate(("DATA", "TRAINING", "EVALUATION")):
        settings[f"LUTHIER_{name}_ADDRESS"] = f"127.0.0.1:{ports[index]}"
        settings[f"LUTHIER_{name}_METRICS_ADDRESS"] = f"127.0.0.1:{ports[index + 3]}"
    return settings


def connection(environment: Mapping[str, str], home: Path) -> ConfigArguments:
    """Return the client's arguments that find the private stack."""
    return ConfigArguments(
        home=home,
        data_address=environment["LUTHIER_DATA_ADDRESS"],
        training_address=environment["LUTHIER_TRAINING_ADDRESS"],
        evaluation_address=environment["LUTHIER_EVALUATION_ADDRESS"],
    )


def await_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the services serve; stop the example with their log when they do not."""
    deadline = time.monotonic() + START_SECONDS
    while "ready in" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"luthierd did not come up:\n{log.read_text()}")
        time.sleep(0.1)


def say(text: str) -> None:
    """Write to the terminal at once, so that it stands before what the next command writes."""
    print(text, flush=True)


def have_base_model(shell: Shell, client: Client) -> None:
    """Download and register the base model, unless the home has it."""
    if MODEL not in {model.name.rsplit("/", 1)[-1] for model in client.models.list()}:
        gguf = shell.luthierd("fetch-demo-model").strip()
        shell.luthier("models", "register", MODEL, "--gguf", gguf)


def create_dataset(shell: Shell, client: Client, name: str, files: Mapping[SplitT, Path]) -> str:
    """Upload files by split as a data set; returns the name of its version."""
    shell.luthier(
        "datasets", "create", "--name", name, *(f"--split={split}={path}" for split, path in files.items())
    )
    return next(iter(client.datasets.versions.list(name))).name


def create_rendering(shell: Shell, client: Client, version: str, *options: str) -> str:
    """Render a version for the base model; returns the rendering's id."""
    shell.luthier("renderings", "create", version, "--model", MODEL, *options)
    return next(iter(client.renderings.list())).name.rsplit("/", 1)[-1]


def before_and_after(
    shell: Shell, client: Client, version: str, name: str, models: Mapping[str, str], *options: str
) -> Evaluation:
    """Ask models by arm the same held-out questions; returns the evaluation."""
    arms = [word for arm, model in models.items() for word in ("--arm", f"{arm}={model}:0")]
    shell.luthier("evaluations", "create", "--version", version, *arms, *options, "--name", name, "--watch")
    return client.evaluations.get(name)


def rates(evaluation: Evaluation, score: str) -> dict[str, float]:
    """Return a score of each arm."""
    return {
        result.arm_id: one.value
        for result in evaluation.arm_results
        for one in result.scores
        if one.score == score
    }


def comparison(evaluation: Evaluation, score: str, candidate: str, baseline: str) -> Comparison:
    """Return what an arm's score is against another's."""
    return next(
        one
        for one in evaluation.comparisons
        if (one.score, one.candidate_arm_id, one.baseline_arm_id) == (score, candidate, baseline)
    )


def proven(evaluation: Evaluation, found: Comparison, what: str) -> bool:
    """Say what an arm's score is against another's; returns whether it is better for sure.

    Its interval lies above 0, and of enough records: of few that are left it may too, and proves nothing.
    """
    rate, wins = rates(evaluation, found.score), found.verdict == VERDICT_BETTER
    say(
        f"\n{what}: {found.candidate_arm_id} {rate[found.candidate_arm_id]:.1%}, {found.baseline_arm_id} "
        f"{rate[found.baseline_arm_id]:.1%}; difference {found.difference:+.1%}, "
        f"paired {100 * found.confidence:.4g} % interval [{found.lower:+.1%}, {found.upper:+.1%}] "
        f"on {found.count} records: "
        f"{found.candidate_arm_id + ' won.' if wins else 'no proof that ' + found.candidate_arm_id + ' won.'}"
    )
    return wins
