"""Whether plans hold on a device: what some runs of a random model take there, against what was planned. One JSON line.

`python benchmarks/gpu_check_plan.py --device cuda:0`: an adapter whose layers keep all, some and nothing, and all
weights, passes of 8,192 tokens of a model of half a billion weights. Memory is the most that torch held on the device,
context and kernels left out on both sides. Time is that of a step against what a plan says for the peak that the
device's maker states; of a device that is not in `gpu_peaks.py` there is none. On a processor a tiny model takes its
place.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibration import Configuration, Scale, expected, make_model, trained
from calibration_speed import measured_speed
from gpu_peaks import peak_of

from luthier.lm.memory import give_back, peak_bytes, resident_bytes, watch_peak
from luthier.lm.rehearsal import rehearse
from luthier.training.jobs.fits import speed_of
from luthier.training.recipes.footprint import Place, Speed
from luthier.v1.fine_tuning_job_pb2 import DeviceClass

ON_GPU = Scale(pass_tokens=8192, hidden=2048, heads=16, layers=8, vocabulary=32_000)
ON_CPU = Scale(pass_tokens=512, hidden=64, layers=2, vocabulary=512)
ROWS_A_PASS = 4
_UNKNOWN = Speed(operations=1.0, trained_head=1.0, bytes=1.0)


def configurations(scale: Scale) -> tuple[Configuration, ...]:
    """Return what is run."""
    rows = scale.pass_tokens // ROWS_A_PASS
    adapters = (
        Configuration(name=f"adapter, {kept}", row_tokens=rows, kept=kept)
        for kept in ("NONE", "SELECTIVE", "FULL")
    )
    return (*adapters, Configuration(name="all weights, FULL", is_whole=True, row_tokens=rows, kept="FULL"))


def speed_here(device: torch.device) -> Speed | None:
    """Return what a plan for this device counts on; None where nobody says."""
    if device.type == "cpu":
        return measured_speed()
    peak = peak_of(torch.cuda.get_device_name(device))
    said = DeviceClass(kind=DeviceClass.KIND_GPU, operations_per_second=peak)
    return speed_of(said) if peak else None


def measured(
    configuration: Configuration, folder: Path, device: torch.device, scale: Scale
) -> dict[str, Any]:
    """Return what a run took, and what was planned."""
    gc.collect()
    give_back(device)
    watch_peak(device)
    # Of a GPU only what this run asks for is counted; of a process what it held before is its libraries.
    before = resident_bytes() if device.type == "cpu" else 0
    spent = trained(configuration, folder, device, scale)
    memory = peak_bytes(device) - before
    speed = speed_here(device)
    place: Place = "CPU" if device.type == "cpu" else "GPU"
    planned_memory, planned = expected(configuration, folder, speed or _UNKNOWN, scale, place)
    return {
        "name": configuration.name,
        "memory_bytes": memory,
        "planned_memory_bytes": planned_memory,
        "memory_error": abs(planned_memory - memory) / max(memory, 1),
        "step_seconds": spent,
        "planned_step_seconds": planned if speed else None,
        "time_error": abs(planned - spent) / spent if speed else None,
    }


def check(device: torch.device) -> dict[str, Any]:
    """Run all; one that fails says why and leaves the others."""
    scale = ON_CPU if device.type == "cpu" else ON_GPU
    rehearse()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, scale)
        # The first run finds kernels and libraries cold, and is not measured.
        small = replace(scale, pass_tokens=scale.pass_tokens // ROWS_A_PASS)
        trained(configurations(small)[0], model, device, small)
        for one in configurations(scale):
            try:
                found.append(measured(one, model, device, scale))
            except torch.OutOfMemoryError as error:
                found.append({"name": one.name, "why": str(error)[:300]})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    errors = [one["memory_error"] for one in found if "memory_error" in one]
    times = [one["time_error"] for one in found if one.get("time_error") is not None]
    return {
        "largest_memory_error": max(errors, default=None),
        "largest_time_error": max(times, default=None),
        "runs": found,
    }


def main() -> int:
    """Read the command line, check, print."""
    parser = argparse.ArgumentParser(description="Compare plans with runs on a device.", allow_abbrev=False)
    parser.add_argument("--device", required=True)
    device = torch.device(parser.parse_args().device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    found = check(device)
    print(json.dumps(found))
    return int(any("why" in one for one in found["runs"]))


if __name__ == "__main__":
    sys.exit(main())
