"""Our Triton kernels and a whole training step against their peers, forward and backward, on this machine's GPU.

`python benchmarks/gpu.py` needs a GPU that torch can use, CUDA or ROCm. It checks every contender against float32,
times those that are right in turns, prints a table, writes results/gpu.json and ends with one line of JSON: our time
over the best contender's, by operator. A peer that is not installed, fails or is wrong is named with the reason.

A training step takes 8,192 tokens, or `--tokens N` where a device has no memory for them, and is told as a share of the
device's peak in bfloat16 too (`gpu_peaks.py`); of a device whose peak nobody put there the share is null, and why is
said. `--only A,B` measures some operators, `--models A,B` takes the shapes of some models, `--results FILE` writes
another file. `--dry-run` goes the whole way without a GPU, small, in float16 and Triton's interpreter, by the
processor's clock, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_peaks import peak_of, share_of, why_no_share

if TYPE_CHECKING:
    from gpu_meter import Problem
    from gpu_models import Model

RESULTS = Path(__file__).parent / "results" / "gpu.json"
# The step comes first: Unsloth changes transformers when it is imported, which its operators' turn does.
OPS = (
    "training_step",
    "lora_linear",
    "lora_linear_multi",
    "lora_mlp",
    "grouped_lora_linear",
    "linear_cross_entropy",
    "linear_logprob",
    "rms_norm",
    "rope",
    "gated_activation",
    "attention_varlen",
)
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "unsloth")
_OURS = "ours"
# What tells the driver and the clocks, for each kind of device.
_ASKED = {
    "nvidia-smi": (
        "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit",
        "--format=csv",
    ),
    "rocm-smi": ("--showdriverversion", "--showclocks", "--json"),
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A problem that is still to be made, for its tensors are large."""

    op: str
    name: str
    make: Callable[[], Problem]


def tasks(
    models: Sequence[Model],
    ops: Sequence[str],
    *,
    is_dry: bool,
    without: Collection[str] = (),
    tokens: int | None = None,
) -> list[Task]:
    """What is to be measured, some contenders left out by name; a step of so many tokens, None: as many as it has."""
    # Here, as importing the kernels settles whether they are interpreted or compiled.
    import gpu_cases
    import gpu_step
    from gpu_models import DRY, DRY_STEP_TOKENS, ON_DEVICE, STEP_TOKENS, with_tokens

    setting = DRY if is_dry else ON_DEVICE
    of_step = with_tokens(setting, tokens or (DRY_STEP_TOKENS if is_dry else STEP_TOKENS))
    made = []
    for op in ops:
        is_step = op == gpu_step.OP
        for model in models:
            make = partial(gpu_step.problem, model, of_step)
            if not is_step:
                make = partial(gpu_cases.problem, op, model, setting)
            name = f"{model.name} {op}" + (f" of {of_step.tokens} tokens" if is_step else "")
            made.append(Task(op, name, partial(_lessened, make, frozenset(without))))
    return made


def _lessened(make: Callable[[], Problem], without: frozenset[str]) -> Problem:
    found = make()
    kept = {name: one for name, one in found.contenders.items() if name not in without}
    return replace(found, contenders=kept)


def measure_all(
    found: Iterable[Task], repeats: int, *, is_dry: bool, peak: float = 0.0
) -> tuple[list[Row], str]:
    """A row for each task, and why there are not all of them, if so; shares are of the device's peak, 0: unknown."""
    from gpu_meter import DeviceClock, DeviceLostError, HostClock, measure, shown

    clock = HostClock() if is_dry else DeviceClock()
    rows: list[Row] = []
    for task in found:
        operations = 0
        try:
            made = task.make()
            operations = made.operations
            outcomes = measure(made, clock, repeats)
        except DeviceLostError as error:
            return rows, f"the device was lost in {task.name}: {error}"
        except Exception as error:
            # Such as a model that is too large for this device: the other problems may be measured.
            outcomes = {"all": {"status": "failed", "why": shown(error)}}
        rows.append({"op": task.op, "problem": task.name, "contenders": outcomes})
        if operations:
            rows[-1] |= {"operations": operations}
            _add_shares(outcomes, operations, peak)
        print("\n".join(lines_of(rows[-1])), flush=True)
    return rows, ""


def _add_shares(outcomes: Mapping[str, Row], operations: int, peak: float) -> None:
    for one in outcomes.values():
        if one["status"] == "timed":
            share = share_of(operations, one["milliseconds"], peak)
            one["peak_share"] = None if share is None else round(share, 4)


def lines_of(row: Row) -> Iterator[str]:
    """A row of results as people read it."""
    yield str(row["problem"])
    for name, outcome in row["contenders"].items():
        if outcome["status"] == "timed":
            peak = outcome["peak_bytes"]
            memory = "" if peak is None else f"  {peak / 2**20:9.1f} MiB"
            alone = outcome["device_milliseconds"]
            device = 18 * " " if alone is None else f"  device {alone:8.3f}"
            share = outcome.get("peak_share")
            reached = "" if share is None else f"  {100 * share:5.1f} % of the peak"
            yield f"  {name:34} {outcome['milliseconds']:10.3f} ms{device}{memory}{reached}"
        else:
            yield f"  {name:34} {outcome['status']}: {outcome['why']}"


def ratio(row: Row, *, only_eager: bool = False, measure: str = "milliseconds") -> float | None:
    """Our time over the best other contender's, or over eager's; None where either was not timed."""
    timed = {
        name: one[measure]
        for name, one in row["contenders"].items()
        if one["status"] == "timed" and one.get(measure) is not None
    }
    ours = timed.pop(_OURS, None)
    others = [taken for name, taken in timed.items() if name == "eager" or not only_eager]
    return ours / min(others) if ours is not None and others else None


def summary_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that releases are compared by: geometric means over the models, None where nothing was timed."""

    def mean(op: str, *, only_eager: bool, measure: str = "milliseconds") -> float | None:
        ratios = [ratio(row, only_eager=only_eager, measure=measure) for row in rows if row["op"] == op]
        logs = [math.log(one) for one in ratios if one is not None]
        return round(math.exp(sum(logs) / len(logs)), 3) if logs else None

    def named(status: str) -> list[str]:
        found = {
            (row["op"], name)
            for row in rows
            for name, one in row["contenders"].items()
            if one["status"] == status
        }
        return [f"{op}: {name}" for op, name in sorted(found)]

    ops = [op for op in OPS if any(row["op"] == op for row in rows)]
    return {
        "ours_vs_best": {op: mean(op, only_eager=False) for op in ops},
        "ours_vs_eager": {op: mean(op, only_eager=True) for op in ops},
        "on_device_vs_best": {op: mean(op, only_eager=False, measure="device_milliseconds") for op in ops},
        "peak_share": {
            row["problem"]: row["contenders"].get(_OURS, {}).get("peak_share")
            for row in rows
            if "operations" in row
        },
        **{status: named(status) for status in ("wrong", "refused", "failed", "missing")},
    }


def surroundings() -> dict[str, Any]:
    """The device and the versions that the figures are true for."""
    import torch

    from luthier.kernels.gpu import architecture

    installed = {
        one.metadata["Name"].lower().replace("_", "-"): one.version
        for one in importlib.metadata.distributions()
    }
    versions: dict[str, Any] = {name: installed.get(name) for name in PACKAGES}
    found = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **versions,
    }
    if not torch.cuda.is_available():
        return {"device": None, **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "architecture": architecture(torch.device("cuda", 0)),
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "driver": {tool: answer_of(tool, options) for tool, options in _ASKED.items() if shutil.which(tool)},
        **found,
    }


def answer_of(tool: str, options: Sequence[str]) -> str:
    """What a vendor's tool says of the first device, or why it says nothing."""
    try:
        done = subprocess.run([tool, *options], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `models` becomes the models' shapes, `ops` the operators."""
    from gpu_models import MODELS, shrunk

    # An abbreviated --dry-run would be seen too late.
    parser = argparse.ArgumentParser(
        description="Time our Triton kernels against their peers.", allow_abbrev=False
    )
    names = [model.name for model in MODELS]
    parser.add_argument("--only", default="", metavar="A,B", help=f"some of {', '.join(OPS)}")
    parser.add_argument("--results", default=RESULTS, type=Path, metavar="FILE", help="the file to write")
    parser.add_argument("--models", default="", metavar="A,B", help=f"some of {', '.join(names)}")
    parser.add_argument(
        "--without", default="", metavar="A,B", help="contenders to leave out, such as torch.compile"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of a training step (default 8192)")
    parser.add_argument(
        "--repeats", type=int, default=20, help="rounds in which all take a turn (default 20)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="the whole way without a GPU; nothing is written"
    )
    arguments = parser.parse_args(argv)
    arguments.ops = arguments.only.split(",") if arguments.only else list(OPS)
    if unknown := [name for name in arguments.ops if name not in OPS]:
        parser.error(f"--only must be of {', '.join(OPS)}, got {', '.join(map(repr, unknown))}")
    chosen = arguments.models.split(",") if arguments.models else names[: 1 if arguments.dry_run else None]
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--models must be of {', '.join(names)}, got {', '.join(map(repr, unknown))}")
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    models = [model for model in MODELS if model.name in chosen]
    arguments.models = [shrunk(model) for model in models] if arguments.dry_run else models
    if arguments.tokens is not None and arguments.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {arguments.tokens}")
    arguments.without = arguments.without.split(",") if arguments.without else []
    if {_OURS, "eager"} & set(arguments.without):
        parser.error(f"--without cannot leave out ours or eager, got {','.join(arguments.without)!r}")
    return arguments


def lacking() -> str:
    """What a run on a device needs and is not there; empty where nothing is."""
    import torch

    if torch.cuda.is_available():
        return ""
    return (
        f"benchmarks/gpu.py needs a GPU that torch can use and a torch built for it (CUDA or ROCm); torch "
        f"{torch.__version__} sees none. --dry-run goes the whole way without one."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the results, print the summary."""
    # Triton settles it when it is imported, and torch imports it wherever it likes.
    if "--dry-run" in (sys.argv[1:] if argv is None else argv):
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    arguments = parse(argv)
    is_dry: bool = arguments.dry_run
    if not is_dry and (message := lacking()):
        print(message, file=sys.stderr)
        return 2
    repeats = 1 if is_dry else arguments.repeats
    found = tasks(
        arguments.models, arguments.ops, is_dry=is_dry, without=arguments.without, tokens=arguments.tokens
    )
    name = None if is_dry else surroundings()["device"]
    peak = peak_of(name) if name else 0.0
    rows, stopped = measure_all(found, repeats, is_dry=is_dry, peak=peak)
    said = {"operations_per_second": peak or None, "why": why_no_share(name) or None}
    summary: dict[str, Any] = {
        "dry_run": is_dry,
        **summary_of(rows),
        "peak": {"device": name, **said},
        "stopped": stopped or None,
    }
    if not is_dry:
        document: Mapping[str, Any] = {
            "machine": surroundings(),
            "dtype": "bfloat16",
            "repeats": repeats,
            "without": arguments.without,
            "rows": rows,
            **summary,
        }
        arguments.results.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(summary))
    return int(bool(stopped))


if __name__ == "__main__":
    sys.exit(main())
