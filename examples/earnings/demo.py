"""The main job for real: examples in, a tuned model out, and the proof that it beats prompting.

Starts `luthierd up` on free ports with a home of its own, types the commands that a user would type, shows each of
them, and stops every process it started. Exit status 0 only if the tuned model wins: the lower bound of the paired
95 % interval of whole-record accuracy, tuned minus the best prompt, is above 0.

    python examples/earnings/demo.py [--fast] [--home FOLDER] [--report FILE]
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import generate
from companies import Split

from luthier.client import Client, ConfigArguments
from luthier.v1.evaluation_pb2 import Comparison, Evaluation

MODEL = "smollm2-135m-instruct-q4"
RECORD_SCORE = "field_match.record"
BIN = Path(sys.executable).parent
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much to spend. `must_win` says whether a tie is a failure."""

    train: int
    validation: int
    max_steps: int
    records: int
    must_win: bool


FULL = Budget(train=720, validation=64, max_steps=45, records=48, must_win=True)
FAST = Budget(train=24, validation=8, max_steps=2, records=4, must_win=False)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Tune a small model on synthetic earnings news.")
    parser.add_argument("--fast", action="store_true", help="a tiny budget; no win is asked for")
    parser.add_argument(
        "--home", type=Path, default=Path(".demo"), help="state of the demo, kept for next time"
    )
    parser.add_argument("--report", type=Path, default=Path("demo-report.html"), help="HTML report to write")
    arguments = parser.parse_args()
    budget = FAST if arguments.fast else FULL
    began = time.monotonic()
    home = arguments.home.resolve()
    with services(home) as environment:
        shell = Shell(environment)
        with Client(connection(environment, home)) as client:
            evaluation = run(shell, client, home, budget, arguments.report)
    say(f"\n{time.monotonic() - began:.0f} s from start to report; every process is stopped.")
    return 0 if judge(evaluation) or not budget.must_win else 1


def run(shell: Shell, client: Client, home: Path, budget: Budget, report: Path) -> Evaluation:
    """Go from raw examples to a judged model; returns the evaluation."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    say("\n1  The base model (downloaded and registered once)")
    registered = {model.name.rsplit("/", 1)[-1]: model for model in client.models.list()}
    if MODEL not in registered:
        gguf = shell.luthierd("fetch-demo-model").strip()
        shell.luthier("models", "register", MODEL, "--gguf", gguf)

    say("\n2  Synthetic earnings news, uploaded, checked and split")
    sizes: dict[Split, int] = {
        "train": budget.train,
        "validation": budget.validation,
        "test": budget.records,
    }
    files = generate.write(home / "earnings", sizes, seed=0)
    splits = [f"--split={split}={path}" for split, path in files.items()]
    shell.luthier("datasets", "create", "--name", f"earnings-{stamp}", *splits)
    version = next(iter(client.datasets.versions.list(f"earnings-{stamp}"))).name

    say("\n3  Rendered to tokens; what is learnt stands out")
    shell.luthier("renderings", "create", version, "--model", MODEL)
    rendering = next(iter(client.renderings.list())).name.rsplit("/", 1)[-1]
    shell.luthier("renderings", "preview", rendering, "--limit", "2")

    say("\n4  Planned, then tuned")
    settings = ["--model", MODEL, "--rendering", rendering, "--max-steps", str(budget.max_steps)]
    settings += ["--batch-tokens", "2048", "--learning-rate", "1.5e-3", "--warmup-steps", "3"]
    shell.luthier("jobs", "plan", *settings)
    tuned = f"tuned-{stamp}"
    shell.luthier("jobs", "create", *settings, "--name", tuned, "--watch")

    say("\n5  Judged: zero-shot, three-shot and tuned on the same held-out records")
    arms = (f"zero-shot={MODEL}:0", f"three-shot={MODEL}:3", f"tuned={tuned}:0")
    chosen = [word for arm in arms for word in ("--arm", arm)]
    limits = ["--max-records", str(budget.records), "--max-new-tokens", "96"]
    metrics = ["--metric", "field-match", "--metric", "exact-match", "--metric", "perplexity"]
    name = f"earnings-{stamp}"
    shell.luthier(
        "evaluations", "create", "--version", version, *chosen, *metrics, *limits, "--name", name, "--watch"
    )
    shell.luthier("evaluations", "report", name, "--output", str(report))
    return client.evaluations.get(name)


def judge(evaluation: Evaluation) -> bool:
    """Say whether tuning was worth it: whole records right, tuned minus the best prompt."""
    versus = [
        one for one in evaluation.comparisons if one.candidate_arm_id == "tuned" and one.score == RECORD_SCORE
    ]
    rate = {
        result.arm_id: score.value
        for result in evaluation.arm_results
        for score in result.scores
        if score.score == RECORD_SCORE
    }
    best: Comparison = max(versus, key=lambda one: rate[one.baseline_arm_id])
    wins = best.lower > 0
    say(
        f"\nWhole records right: tuned {rate['tuned']:.1%}, best prompt ({best.baseline_arm_id}) "
        f"{rate[best.baseline_arm_id]:.1%}; difference {best.difference:+.1%}, paired 95 % interval "
        f"[{best.lower:+.1%}, {best.upper:+.1%}] on {best.count} records: "
        f"{'tuning won.' if wins else 'no proof that tuning won.'}"
    )
    return wins


class Shell:
    """Types commands: shows each, runs it, and stops the demo when one fails."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def luthier(self, *words: str) -> None:
        """Run the client's command on the terminal."""
        self._run([str(BIN / "luthier"), *words], capture=False)

    def luthierd(self, *words: str) -> str:
        """Run the daemon's command and return what it prints."""
        return self._run([str(BIN / "luthierd"), *words], capture=True)

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
    """Return when the services serve; stop the demo with their log when they do not."""
    deadline = time.monotonic() + START_SECONDS
    while "ready in" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"luthierd did not come up:\n{log.read_text()}")
        time.sleep(0.1)


def say(text: str) -> None:
    """Write to the terminal at once, so that it stands before what the next command writes."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
