"""The benchmark for GPUs: its whole way on the processor, what it refuses, and how it judges contenders."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import torch
from gpu_meter import EAGER, OURS, Contender, DeviceLostError, HostClock, Problem, Program, measure
from torch import Tensor

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
EXACT = torch.linspace(1, 2, 1000)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    # The operators' tests run Triton's interpreter in this process; no device is to be seen, even where one is.
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=surroundings, check=False
    )


def computes(results: list[Tensor]) -> Contender:
    return Contender(lambda: Program(results=lambda: results, run=lambda: None, restore=lambda: None), {})


def problem(**contenders: Contender) -> Problem:
    return Problem(
        dtype=torch.float16,
        reference=computes([EXACT]).make,
        contenders={EAGER: computes([EXACT.half()]), **contenders},
    )


def dry_run(capsys: pytest.CaptureFixture[str]) -> str:
    """What it prints; in a process of its own where kernels are not interpreted here, or Unsloth would change ours."""
    if os.environ.get("TRITON_INTERPRET") and importlib.util.find_spec("unsloth") is None:
        assert gpu.main(["--dry-run"]) == 0
        return capsys.readouterr().out
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # as in a process of its own: the peers' are not ours to mend
def test_a_dry_run_goes_the_whole_way(capsys: pytest.CaptureFixture[str]) -> None:
    results = gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None
    *lines, last = dry_run(capsys).splitlines()
    found = json.loads(last)
    assert found["dry_run"]
    assert found["wrong"] == []
    assert list(found["ours_vs_best"]) == list(gpu.OPS)
    assert found["refused"] == []
    assert None not in found["ours_vs_eager"].values()
    assert found["peak_share"] == {"SmolLM2-135M training_step of 48 tokens": None}
    assert found["peak"] == {
        "device": None,
        "operations_per_second": None,
        "why": "there is no device: what a processor takes is no share of a GPU's peak",
    }
    for peer in ("Liger", "cut-cross-entropy", "Unsloth"):
        assert any(line.split()[:1] == peer.split()[:1] for line in lines)
    assert (gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None) == results


def test_without_a_gpu_it_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--repeats", "3"]) == 2
    assert "needs a GPU that torch can use and a torch built for it (CUDA or ROCm)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "rope,swish"], "attention_varlen, got 'swish'"),
        (["--models", "Llama-3.2-1B,GPT"], "--models must be of SmolLM2-135M, Llama-3.2-1B, "),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
        (["--dry"], "unrecognized arguments: --dry"),
        (["--without", "Liger,eager"], "--without cannot leave out ours or eager, got 'Liger,eager'"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        gpu.parse(options)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_contenders_are_left_out_by_name() -> None:
    arguments = gpu.parse(["--dry-run", "--only", "rms_norm", "--without", "torch.compile,Liger"])
    (task,) = gpu.tasks(arguments.models, arguments.ops, is_dry=True, without=arguments.without)
    assert list(task.make().contenders) == [OURS, EAGER, "Unsloth"]


def test_a_dry_run_takes_the_first_model_small() -> None:
    (model,) = gpu.parse(["--dry-run"]).models
    assert (model.name, model.hidden) == ("SmolLM2-135M", 64)
    assert len(gpu.parse([]).models) == 4


def test_a_step_on_a_device_takes_8192_tokens_or_what_is_asked_for() -> None:
    models = gpu.parse(["--models", "Llama-3.1-8B"]).models
    names = [
        task.name
        for tokens in (None, 4096, 5000)
        for task in gpu.tasks(models, ["training_step", "rope"], is_dry=False, tokens=tokens)
    ]
    assert names[:2] == ["Llama-3.1-8B training_step of 8192 tokens", "Llama-3.1-8B rope"]
    assert names[2::2] == [f"Llama-3.1-8B training_step of {tokens} tokens" for tokens in (4096, 5000)]


def test_a_run_is_told_as_a_share_of_the_devices_peak() -> None:
    counted = replace(problem(ours=computes([EXACT.half()])), operations=10**6)
    tasks = [gpu.Task("training_step", "a step", lambda: counted), gpu.Task("rope", "another", problem)]
    rows, _ = gpu.measure_all(tasks, 1, is_dry=True, peak=1e12)
    timed = rows[0]["contenders"][OURS]
    assert timed["peak_share"] == pytest.approx(1e6 / (timed["milliseconds"] / 1e3) / 1e12, abs=1e-4)
    assert any("% of the peak" in line for line in gpu.lines_of(rows[0]))
    assert gpu.summary_of(rows)["peak_share"] == {"a step": timed["peak_share"]}
    assert "peak_share" not in rows[1]["contenders"][EAGER]
    rows, _ = gpu.measure_all(tasks, 1, is_dry=True)
    assert rows[0]["contenders"][OURS]["peak_share"] is None, "a device whose peak is not known"


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    """All products but attention's, whose pairs no counter knows: plain torch computes more of them than there are."""
    import gpu_step
    from gpu_models import DRY, MODELS, shrunk
    from torch.utils.flop_counter import FlopCounterMode

    model = replace(shrunk(MODELS[0]), layers=2)
    setting = replace(DRY, dtype=torch.float32)
    made = gpu_step.problem(model, setting)
    step = made.contenders[EAGER].make()
    with FlopCounterMode(display=False) as counter:
        step.run()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in products)
    seen = sum(length * (length + 1) // 2 for length in setting.lengths)
    assert made.operations - 12 * model.layers * model.heads * model.head_dim * seen == counted


def test_a_wrong_contender_is_not_timed() -> None:
    off = EXACT.clone()
    off[7] = 0
    found = measure(
        problem(ours=computes([EXACT]), off=computes([off]), nan=computes([EXACT * float("nan")])),
        HostClock(),
        repeats=3,
    )
    assert found[OURS]["milliseconds"] >= 0
    assert found[EAGER]["status"] == "timed"
    assert found["off"]["status"] == found["nan"]["status"] == "wrong"
    assert found["off"]["why"].startswith("result 0 is 2.08e-02 off, allowed are 8")
    assert "milliseconds" not in found["off"]
    assert found["nan"]["error"] is None


def test_a_contender_may_be_twice_as_far_off_as_eager() -> None:
    rounded = EXACT + 2 * (EXACT.half() - EXACT)
    worse = measure(problem(other=computes([rounded])), HostClock(), 1)["other"]
    assert worse["status"] == "timed"
    assert 0 < worse["error"] < worse["allowed_error"] < 1e-3


def test_a_missing_contender_is_listed() -> None:
    absent = Contender(computes([EXACT]).make, {"no_such_package": "no-such-package", "torch": "torch"})
    found = measure(problem(Peer=absent), HostClock(), 1)
    assert found["Peer"] == {"status": "missing", "why": "not installed: no-such-package"}
    row = {"op": "rope", "problem": "p", "contenders": found}
    assert gpu.summary_of([row])["missing"] == ["rope: Peer"]
    assert "  Peer" + 31 * " " + "missing: not installed: no-such-package" in gpu.lines_of(row)


def test_a_contender_that_fails_does_not_stop_the_others() -> None:
    def refuse() -> Program:
        raise ValueError("impl 'triton' is not there")

    broken = problem(ours=Contender(refuse, {}), peer=Contender(refuse, {}), short=computes([EXACT[1:]]))
    found = measure(broken, HostClock(), 1)
    assert found[OURS] == {"status": "refused", "why": "ValueError: impl 'triton' is not there"}
    assert found["peer"]["status"] == found["short"]["status"] == "failed"
    assert "got [(999,)]" in found["short"]["why"]
    assert found[EAGER]["status"] == "timed"


def test_without_a_reference_nothing_is_timed() -> None:
    def exhaust() -> Program:
        raise torch.OutOfMemoryError("out of\nmemory")

    there = problem(ours=computes([EXACT]))
    lost = Problem(dtype=there.dtype, reference=exhaust, contenders=there.contenders)
    found = measure(lost, HostClock(), 1)
    assert {one["why"] for one in found.values()} == {
        "nothing to compare with: OutOfMemoryError: out of memory"
    }


def test_a_lost_device_ends_the_run_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Program:
        raise RuntimeError("illegal memory access")

    def lose(self: HostClock) -> None:
        raise DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(HostClock, "check_alive", lose)
    found = [problem(), problem(ours=Contender(fail, {})), problem()]
    tasks = [gpu.Task("rope", "a problem", lambda one=one: one) for one in found]  # type: ignore[misc]
    rows, stopped = gpu.measure_all(tasks, 1, is_dry=True)
    assert len(rows) == 1
    assert stopped == "the device was lost in a problem: an illegal memory access was encountered"


def test_a_problem_that_cannot_be_made_is_listed() -> None:
    def fail() -> Problem:
        raise torch.OutOfMemoryError("out of memory")

    rows, stopped = gpu.measure_all(
        [gpu.Task("rope", "large", fail), gpu.Task("rms_norm", "small", problem)], 1, is_dry=True
    )
    assert not stopped
    assert [list(row["contenders"]) for row in rows] == [["all"], [EAGER]]
    assert gpu.summary_of(rows)["failed"] == ["rope: all"]


def test_ratios_are_to_the_best_and_their_mean_is_geometric() -> None:
    def row(op: str, **milliseconds: float) -> gpu.Row:
        timed = {name: {"status": "timed", "milliseconds": one} for name, one in milliseconds.items()}
        return {"op": op, "contenders": timed | {"late": {"status": "wrong", "why": "result 0"}}}

    summary = gpu.summary_of(
        [
            row("rope", ours=1, eager=4, Liger=2),
            row("rope", ours=8, eager=4, Liger=9),
            row("rms_norm", eager=1),
        ]
    )
    assert summary["ours_vs_best"] == {"rms_norm": None, "rope": 1.0}
    assert summary["ours_vs_eager"] == {"rms_norm": None, "rope": 0.707}
    assert summary["wrong"] == ["rms_norm: late", "rope: late"]
