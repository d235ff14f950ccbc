"""A job on a device through real services: trained, killed and gone on with, evaluated, asked; one line of JSON.

`python benchmarks/gpu_check_job.py --device cuda:0 --model FOLDER_OR_GGUF --home EMPTY_FOLDER`. Services and workers
are processes of their own; the training worker of the second job, whose settings are the first one's, is ended by
SIGKILL behind its first checkpoint. `same_bits` says whether both left the same checkpoints, `faults` what must not be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service_processes import WAIT_SECONDS, Stack, running

from luthier.client import Client
from luthier.v1.chat_pb2 import ChatMessage
from luthier.v1.dataset_pb2 import SPLIT_TEST, SPLIT_TRAIN, DatasetSource
from luthier.v1.evaluation_pb2 import Evaluation, EvaluationArm
from luthier.v1.fine_tuning_job_pb2 import Determinism, FineTuningJob, Hyperparameters, LoraConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering

_COLOURS = ("red", "green", "blue")
_TRAIN_RECORDS = 400
_TEST_RECORDS = 24


def write_chats(path: Path, numbers: range) -> Path:
    """Write chats that are learnt in some steps: the colours of numbered things."""
    with path.open("w") as file:
        for number in numbers:
            answer = json.dumps({"thing": number, "colour": _COLOURS[number % 3]})
            turns = [
                {"role": "user", "content": f"Which colour has thing {number}? Answer in JSON."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def prepare(stack: Stack, client: Client, model: Path) -> str:
    """Register the model as `base`, build and render a version; returns the rendering's name."""
    inside = stack.home / "models" / model.name
    inside.parent.mkdir(exist_ok=True)
    if model.is_dir():
        shutil.copytree(model, inside)
        source = Model(directory=str(inside))
    else:
        shutil.copy(model, inside)
        source = Model(gguf_path=str(inside))
    client.models.register_base(source, model_id="base")
    client.models.wait("base", timeout_seconds=WAIT_SECONDS)
    client.datasets.create("things")
    train = write_chats(stack.home / "train.jsonl", range(_TRAIN_RECORDS))
    test = write_chats(stack.home / "test.jsonl", range(_TRAIN_RECORDS, _TRAIN_RECORDS + _TEST_RECORDS))
    sources = [
        DatasetSource(upload=client.datasets.upload(path).name, split=split)
        for path, split in ((train, SPLIT_TRAIN), (test, SPLIT_TEST))
    ]
    version = client.datasets.create_version("things", sources)
    client.datasets.versions.wait(version.name, timeout_seconds=WAIT_SECONDS)
    rendering = client.renderings.create(Rendering(dataset_version=version.name, model="base"))
    return client.renderings.wait(rendering.name, timeout_seconds=WAIT_SECONDS).name


def job_of(rendering: str, num_steps: int) -> FineTuningJob:
    """Return what both jobs are."""
    return FineTuningJob(
        base_model="base",
        rendering=rendering,
        lora=LoraConfig(rank=16),
        hyperparameters=Hyperparameters(
            max_steps=num_steps, num_epochs=1000, batch_rows=16, learning_rate=1e-3
        ),
        checkpoint_interval_steps=max(1, num_steps // 3),
        max_checkpoints=10,
    )


def killed_job(stack: Stack, client: Client, wanted: FineTuningJob) -> FineTuningJob:
    """Run a job whose worker is ended by SIGKILL behind its first checkpoint and started again."""
    made = client.jobs.create(wanted, job_id="killed")
    for event in client.jobs.watch(made.name):
        if event.WhichOneof("payload") == "checkpoint":
            break
    worker = stack.processes["worker training"]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    stack.start_worker("training")
    return client.jobs.wait("killed", timeout_seconds=WAIT_SECONDS)


def digests(client: Client, job_id: str) -> list[tuple[int, str]]:
    """Return the checkpoints of a job, by step and digest of their files."""
    return [(one.step, one.digest) for one in client.jobs.checkpoints(job_id)]


def told_of(client: Client, job: FineTuningJob) -> dict[str, Any]:
    """Return what a job says of its run."""
    record, points = job.run_record, list(client.jobs.metrics(job.name))
    speeds = sorted(point.values["tokens_per_second"] for point in points)
    return {
        "device": record.device,
        "attention": record.kernels["attention"],
        "determinism": Determinism.Name(record.determinism).removeprefix("DETERMINISM_"),
        "best_effort_reason": record.best_effort_reason,
        "num_attempts": job.num_attempts,
        "first_loss": points[0].values["train_loss"],
        "last_loss": points[-1].values["train_loss"],
        "tokens_per_second_p50": speeds[len(speeds) // 2],
    }


def check(stack: Stack, model: Path, num_steps: int) -> dict[str, Any]:
    """Go the whole way; returns what was found and how long each stage took."""
    found: dict[str, Any] = {"steps": num_steps, "seconds": {}}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        value = call()
        found["seconds"][stage] = round(time.monotonic() - began, 2)
        return value

    with stack.client() as client:
        rendering = timed("prepare", lambda: prepare(stack, client, model))
        wanted = job_of(rendering, num_steps)
        client.jobs.create(wanted, job_id="whole")
        whole = timed("job", lambda: client.jobs.wait("whole", timeout_seconds=WAIT_SECONDS))
        found["whole"] = told_of(client, whole)
        killed = timed("killed_job", lambda: killed_job(stack, client, wanted))
        found["killed"] = told_of(client, killed)
        found["checkpoints"] = len(digests(client, "whole"))
        found["same_bits"] = digests(client, "whole") == digests(client, "killed")
        found["scores"] = timed("evaluation", lambda: evaluated(client, rendering, whole.tuned_model))
        pieces = timed("generate", lambda: asked(client, whole.tuned_model))
        found["answer"] = pieces
    found["faults"] = list(faults_of(found, named(stack.device)))
    return found


def named(device: str) -> str:
    """Return what runs on a device say that they ran on; of a processor nothing: they name its instruction set."""
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name(device)


def faults_of(found: Mapping[str, Any], device: str) -> Iterator[str]:
    """Yield what must not be of what was found."""
    for name, attempts in (("whole", 1), ("killed", 2)):
        job = found[name]
        if device not in job["device"]:
            yield f"the {name} job ran on {job['device']}, not on {device}"
        if job["determinism"] != "BITWISE":
            yield f"the {name} job promises no bits: {job['best_effort_reason']}"
        if job["num_attempts"] != attempts:
            yield f"the {name} job took {job['num_attempts']} attempts, not {attempts}"
        if not job["last_loss"] < job["first_loss"]:
            yield f"the {name} job learnt nothing: its loss went from {job['first_loss']} to {job['last_loss']}"
    if not found["checkpoints"]:
        yield "there is no checkpoint to compare"
    if not found["same_bits"]:
        yield "the job that was killed and went on left other checkpoints"


def evaluated(client: Client, rendering: str, tuned: str) -> Mapping[str, float]:
    """Return the share of right answers of the base and the tuned model."""
    version = client.renderings.get(rendering).dataset_version
    arms = [EvaluationArm(arm_id=arm, model=model) for arm, model in (("base", "base"), ("tuned", tuned))]
    wanted = Evaluation(dataset_version=version, arms=arms, max_new_tokens=32)
    done = client.evaluations.wait(client.evaluations.create(wanted).name, timeout_seconds=WAIT_SECONDS)
    return {result.arm_id: result.scores[0].value for result in done.arm_results}


def asked(client: Client, tuned: str) -> str:
    """Return what the tuned model answers."""
    turns = [ChatMessage(role="user", content="Which colour has thing 7? Answer in JSON.")]
    return "".join(piece.text for piece in client.generate(tuned, turns, max_new_tokens=32))


def main() -> int:
    """Read the command line, check, print."""
    parser = argparse.ArgumentParser(description="Train, resume, evaluate and ask through real services.")
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER_OR_GGUF")
    parser.add_argument("--home", required=True, type=Path, metavar="EMPTY_FOLDER")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    with running(arguments.home.resolve(), arguments.device) as stack:
        try:
            found = check(stack, arguments.model.resolve(), arguments.steps)
        except Exception:
            print(stack.logs(), file=sys.stderr)
            raise
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
