"""The check of a GPU keeps what each part found, whatever becomes of the others, and ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_check import PARTS, Part, Plan, check


def part(name: str, code: str, limit_seconds: float = 60.0) -> Part:
    def read(_: Plan, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        return {"said": done.stdout.strip(), "code": done.returncode}

    return Part(
        name=name, limit_seconds=limit_seconds, command=lambda _: [sys.executable, "-c", code], read=read
    )


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(device="cuda:0", model=tmp_path, folder=tmp_path)


def test_each_part_is_kept_and_one_that_hangs_is_ended_with_all_that_it_started(
    plan: Plan, tmp_path: Path
) -> None:
    hangs = (
        "import subprocess, sys, time; "
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(60)"
    )
    kept: list[dict[str, Any]] = []
    parts = [part("a", "print('fine')"), part("b", hangs, 5.0), part("c", "print('also')")]
    found = check(plan, parts, lambda one: kept.append(dict(one)))
    assert [one["status"] for one in found.values()] == ["done", "failed", "done"]
    assert found["a"]["said"] == "fine"
    assert found["b"]["why"] == "it took more than 5 s"
    assert found["b"]["stdout"] == "begun\n"
    assert [list(one) for one in kept] == [["a"], ["a", "b"], ["a", "b", "c"]]
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_part_whose_end_cannot_be_read_says_what_it_wrote(plan: Plan) -> None:
    broken = Part(
        name="broken",
        limit_seconds=60.0,
        command=lambda _: [sys.executable, "-c", "import sys; sys.exit('no device')"],
        read=gpu_check._read_last_line,
    )
    found = check(plan, [broken], lambda _: None)["broken"]
    assert (found["status"], found["why"]) == ("failed", "ValueError: it ended with 1")
    assert "no device" in found["stderr"]


def test_no_part_begins_that_no_time_is_left_for(plan: Plan) -> None:
    began = time.monotonic()
    found = check(plan, [part("a", "import time; time.sleep(60)")], lambda _: None, limit_seconds=1.0)
    assert found == {"a": {"status": "no time left"}}
    assert time.monotonic() - began < 1.0
    assert sum(one.limit_seconds for one in PARTS) <= 490.0
    assert gpu_check.LIMIT_SECONDS <= 480.0, "8 minutes"


def test_failed_tests_are_named(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "kernels.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure/></testcase></testsuite></testsuites>'
    )
    done = subprocess.CompletedProcess([], 1, "", "")
    found = gpu_check._read_kernels(plan, done)
    assert found == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["a::c"]}
    (tmp_path / "kernels.xml").write_text('<testsuites><testsuite tests="0"/></testsuites>')
    with pytest.raises(ValueError, match="no test was run"):
        gpu_check._read_kernels(plan, done)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--model", str(tmp_path)]) == 2
    assert "needs a GPU that torch can use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--only", "job,lunch"], "--only must be of kernels, job, plan, step, got 'lunch'"),
        (["--model", "/none such"], "--model must be a folder or a GGUF file that is there, got /none such"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_it_cannot_do_is_refused(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(words)
    assert text in capsys.readouterr().err


def test_a_device_computes_what_the_processor_does_in_small(tmp_path: Path) -> None:
    """What each part runs, and reads, on a device: no machine of ours has one to run it on."""
    on_device = Plan(device="cuda:0", model=tmp_path, folder=tmp_path)
    commands = {part.name: part.command(on_device) for part in PARTS}
    assert list(commands) == ["kernels", "job", "plan", "step"]
    assert "--collect-only" not in commands["kernels"]
    assert [one for one in commands["kernels"] if one.endswith(".py")], "tests outside of kernels are named"
    for name, flags in {"job": ("--device", "cuda:0"), "plan": ("--device", "cuda:0")}.items():
        place = commands[name].index(flags[0])
        assert commands[name][place + 1] == flags[1]
    assert "--dry-run" not in commands["step"]
    for command in commands.values():
        for word in command:
            assert not word.endswith(".py") or (Path(gpu_check.HERE.parent) / word).exists(), word


def test_the_step_on_a_device_has_the_rows_beside_its_summary(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(json.dumps({"rows": [{"op": "training_step"}]}))
    done = subprocess.CompletedProcess([], 0, 'noise\n{"training_step": 0.7}\n', "")
    assert gpu_check._read_step(plan, done) == {"training_step": 0.7, "rows": [{"op": "training_step"}]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_the_way_over_the_processor_goes_through_each_part(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = gpu_check.main(["--device", "cpu", "--only", name])
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = told["parts"][name]
    assert status == 0, found
    assert (told["device"], told["model"]) == ("cpu", "random")
    SEEN[name](found)


def _job_seen(found: dict[str, Any]) -> None:
    assert (found["checkpoints"], found["same_bits"]) == (3, True)
    assert (found["whole"]["num_attempts"], found["killed"]["num_attempts"]) == (1, 2)
    assert found["whole"]["determinism"] == "BITWISE"
    assert found["whole"]["last_loss"] < found["whole"]["first_loss"]
    assert set(found["scores"]) == {"base", "tuned"}


def _plan_seen(found: dict[str, Any]) -> None:
    assert [run["name"] for run in found["runs"]] == [
        "adapter, NONE",
        "adapter, SELECTIVE",
        "adapter, FULL",
        "all weights, FULL",
    ]
    assert all(run["planned_memory_bytes"] > 0 < run["step_seconds"] for run in found["runs"])
    assert found["largest_time_error"] is not None


def _step_seen(found: dict[str, Any]) -> None:
    assert found["dry_run"] is True
    assert found["stopped"] is None
    assert found["peak_share"] == {"SmolLM2-135M training_step of 48 tokens": None}
    assert found["peak"]["why"].startswith("there is no device")


SEEN = {
    "kernels": lambda found: found["collected"] > 10 or pytest.fail(str(found)),
    "job": _job_seen,
    "plan": _plan_seen,
    "step": _step_seen,
}
