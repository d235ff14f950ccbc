"""The check of a GPU keeps what each part found, whatever becomes of the others, and ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_job
import pytest
import torch
from gpu_check import PARTS, Part, Plan, check

from luthier.errors import Reason, Unavailable


def part(name: str, code: str, limit_seconds: float = 60.0) -> Part:
    def read(_: Plan, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        return {"said": done.stdout.strip(), "code": done.returncode, "faults": []}

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
    assert found["b"]["faults"] == ["it took more than 5 s"]
    assert found["b"]["said"] == "begun", "what was found until then is kept"
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
    assert (found["status"], found["faults"]) == ("failed", ["it ended with 1"])
    assert "no device" in found["stderr"]


def test_no_part_begins_that_no_time_is_left_for(plan: Plan) -> None:
    began = time.monotonic()
    found = check(plan, [part("a", "import time; time.sleep(60)")], lambda _: None, limit_seconds=1.0)
    assert found == {"a": {"status": "no time left"}}
    assert time.monotonic() - began < 1.0
    assert sum(one.limit_seconds for one in PARTS) <= 490.0
    assert gpu_check.LIMIT_SECONDS <= 480.0, "8 minutes"


def ended(stdout: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, stdout, "")


TOLD = """
tests/kernels/test_a.py::test_one[triton-a b] PASSED                [ 20%]
tests/kernels/test_a.py::test_two FAILED                            [ 40%]
tests/lm/test_b.py::test_three SKIPPED (needs two GPUs)             [ 60%]
tests/lm/test_b.py::test_four PASSED                                [ 80%]
tests/lm/test_b.py::test_four ERROR                                 [ 80%]
tests/lm/test_b.py::test_five"""


def test_tests_are_told_of_one_by_one_also_where_no_time_was_left_for_the_last(plan: Plan) -> None:
    found = gpu_check._read_kernels(plan, ended(TOLD, -9))
    assert found == {
        "passed": 2,
        "failed": ["tests/kernels/test_a.py::test_two", "tests/lm/test_b.py::test_four"],
        "skipped": ["tests/lm/test_b.py::test_three"],
        "faults": ["tests/kernels/test_a.py::test_two failed", "tests/lm/test_b.py::test_four failed"],
    }


@pytest.mark.parametrize(
    ("told", "code", "faults"),
    [
        ("tests/a.py::b PASSED [100%]", 0, []),
        ("tests/a.py::b PASSED [ 50%]", -11, ["pytest ended with -11"]),
        ("tests/a.py::b SKIPPED (needs a GPU) [100%]", 0, ["no test passed"]),
        ("", 5, ["no test passed", "pytest ended with 5"]),
    ],
)
def test_tests_that_show_nothing_are_a_fault(plan: Plan, told: str, code: int, faults: list[str]) -> None:
    assert gpu_check._read_kernels(plan, ended(told, code))["faults"] == faults


@pytest.mark.parametrize(
    ("told", "code", "found"),
    [
        ("tests/a.py::b\ntests/a.py::c\n\n2 tests collected", 0, {"collected": 2, "faults": []}),
        ("", 5, {"collected": 0, "faults": ["pytest ended with 5, and collected 0 tests"]}),
    ],
)
def test_in_small_tests_are_only_collected(plan: Plan, told: str, code: int, found: dict[str, Any]) -> None:
    in_small = Plan(device="cpu", model=plan.model, folder=plan.folder)
    assert gpu_check._read_kernels(in_small, ended(told, code)) == found


def test_real_tests_are_told_of_as_they_are_read(plan: Plan, tmp_path: Path) -> None:
    """What pytest writes is its own affair, and another version's may be other."""
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('one', ['a b', 'c'])\ndef test_good(one): pass\n"
        "def test_bad(): assert False\n"
        "def test_none(): pytest.skip('needs a GPU')\n"
        "@pytest.fixture\ndef left():\n    yield\n    assert False\n"
        "def test_untidy(left): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = gpu_check._read_kernels(plan, done)
    assert found["failed"] == ["tests/test_some.py::test_bad", "tests/test_some.py::test_untidy"]
    assert (found["passed"], found["skipped"]) == (3, ["tests/test_some.py::test_none"])


def test_tests_for_a_gpu_are_found_wherever_they_are(tmp_path: Path) -> None:
    mark = f"pytest.{gpu_check._MARK}"
    for name in ("test_one.py", "some/test_two.py", "all/conftest.py", "all/below/test_three.py"):
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(mark)
    (tmp_path / "tests" / "test_none.py").write_text("")
    assert gpu_check.gpu_tests(tmp_path) == ["tests/all", "tests/some/test_two.py", "tests/test_one.py"]


@pytest.mark.slow
def test_no_test_for_a_gpu_is_left_out() -> None:
    """All that is marked, by whatever way, is what the check collects."""

    def collected(*places: str) -> set[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        root = gpu_check.HERE.parent
        done = subprocess.run([*command, *places], cwd=root, capture_output=True, text=True, check=True)
        return {line for line in done.stdout.splitlines() if "::" in line}

    everything = collected("tests")
    assert len(everything) > 10
    assert collected(*gpu_check.gpu_tests(gpu_check.HERE.parent)) == everything


def test_what_a_part_found_is_kept_beside_its_faults(plan: Plan) -> None:
    told = json.dumps({"same_bits": False, "faults": ["other bits"]})
    found = gpu_check._read_last_line(plan, ended(f"noise\n{told}\n", 1))
    assert found == {"same_bits": False, "faults": ["other bits", "it ended with 1"]}
    assert gpu_check._read_last_line(plan, ended(""))["faults"] == ["it said nothing of what it found"]
    code = f"print({told!r})"
    one = Part(
        name="job",
        limit_seconds=60.0,
        command=lambda _: [sys.executable, "-c", code],
        read=gpu_check._read_last_line,
    )
    kept = check(plan, [one], lambda _: None)["job"]
    assert (kept["status"], kept["same_bits"], kept["faults"]) == ("failed", False, ["other bits"])


@pytest.mark.parametrize(
    ("memory", "time_error", "faults"),
    [
        (0.15, 0.4, []),
        (0.1, None, []),
        (
            0.16,
            0.41,
            [
                "memory is 16% off the plan, 15% at most may be",
                "time is 41% off the plan, 40% at most may be",
            ],
        ),
        (None, 0.1, ["no run told of its memory"]),
    ],
)
def test_a_plan_that_is_further_off_than_plans_may_be_is_a_fault(
    plan: Plan, memory: float | None, time_error: float | None, faults: list[str]
) -> None:
    told = json.dumps({"largest_memory_error": memory, "largest_time_error": time_error})
    assert gpu_check._read_plan(plan, ended(told))["faults"] == faults
    in_small = Plan(device="cpu", model=plan.model, folder=plan.folder)
    assert gpu_check._read_plan(in_small, ended(told))["faults"] == []


def job_found(**changes: Any) -> dict[str, Any]:
    """Return what the job's part finds where all is well, less what is changed of the job that was killed."""
    job: dict[str, Any] = {
        "device": "NVIDIA H200 (sm_90)",
        "determinism": "BITWISE",
        "best_effort_reason": "",
        "num_attempts": 1,
        "first_loss": 2.0,
        "last_loss": 1.0,
    }
    found: dict[str, Any] = {
        "whole": job,
        "killed": {**job, "num_attempts": 2},
        "checkpoints": 3,
        "same_bits": True,
    }
    top = {name: changes.pop(name) for name in list(changes) if name in found}
    found["killed"] |= changes
    return found | top


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"same_bits": False}, "the job that was killed and went on left other checkpoints"),
        ({"checkpoints": 0}, "there is no checkpoint to compare"),
        ({"device": "AMD EPYC"}, "the killed job ran on AMD EPYC, not on NVIDIA H200"),
        (
            {"determinism": "BEST_EFFORT", "best_effort_reason": "ROCm"},
            "the killed job promises no bits: ROCm",
        ),
        ({"num_attempts": 1}, "the killed job took 1 attempts, not 2"),
        ({"last_loss": float("nan")}, "the killed job learnt nothing: its loss went from 2.0 to nan"),
    ],
)
def test_what_must_not_be_of_a_job_is_a_fault(changes: dict[str, Any], fault: str | None) -> None:
    found = list(gpu_check_job.faults_of(job_found(**changes), "NVIDIA H200"))
    assert found == ([fault] if fault else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--model", str(tmp_path)]) == 2
    assert "needs a GPU that torch can use" in capsys.readouterr().err


def test_without_a_model_the_demos_is_taken_and_no_other_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(home: Path) -> Path:
        raise Unavailable(f"pip could not download it to {home}", reason=Reason.SERVICE_UNAVAILABLE)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "fetch_demo_model", nowhere)
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().err
    assert "pip could not download it to" in said
    assert "--model random makes one" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--only", "job,lunch"], "--only must be of kernels, job, plan, step, got 'lunch'"),
        (
            ["--model", "/none such"],
            "must be a folder or a GGUF file that is there, or random, got /none such",
        ),
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
    assert {"tests/training/recipes/test_moments.py", "tests/lm/test_gpu.py"} < set(commands["kernels"])
    assert "tests/training/worker/test_gpu.py" in commands["kernels"]
    for name, flags in {"job": ("--device", "cuda:0"), "plan": ("--device", "cuda:0")}.items():
        place = commands[name].index(flags[0])
        assert commands[name][place + 1] == flags[1]
    assert "--dry-run" not in commands["step"]
    for command in commands.values():
        for word in command:
            assert not word.endswith(".py") or (Path(gpu_check.HERE.parent) / word).exists(), word


def step_told(**changes: Any) -> str:
    summary = {"peak_share": {"8B": 0.5}, "ours_vs_best": {"training_step": 0.8}, "stopped": None}
    return f"noise\n{json.dumps(summary | changes)}\n"


def test_the_step_on_a_device_has_the_rows_beside_its_summary(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text(json.dumps({"rows": [{"op": "training_step"}]}))
    found = gpu_check._read_step(plan, ended(step_told()))
    assert found["rows"] == [{"op": "training_step"}]
    assert (found["ours_vs_best"], found["faults"]) == ({"training_step": 0.8}, [])
    assert found["goals_met"] == {"peak_share": True, "ours_vs_best": True}
    slow = step_told(peak_share={"8B": 0.49}, ours_vs_best={"training_step": 0.81})
    assert gpu_check._read_step(plan, ended(slow))["goals_met"] == {
        "peak_share": False,
        "ours_vs_best": False,
    }
    unknown = step_told(peak_share={"8B": None}, ours_vs_best={"training_step": None})
    assert gpu_check._read_step(plan, ended(unknown))["goals_met"] == {
        "peak_share": None,
        "ours_vs_best": None,
    }


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"failed": ["training_step: PEFT"], "missing": ["training_step: Liger (PEFT)"]}, []),
        ({"wrong": ["training_step: ours"]}, ["our own step is wrong"]),
        ({"failed": ["training_step: all"]}, ["our own step is failed"]),
        ({"stopped": "the device was lost"}, ["the device was lost"]),
    ],
)
def test_a_step_of_ours_that_was_not_timed_is_a_fault_and_a_peer_is_none(
    plan: Plan, changes: dict[str, Any], faults: list[str]
) -> None:
    assert gpu_check._read_step(plan, ended(step_told(**changes)))["faults"] == faults


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
