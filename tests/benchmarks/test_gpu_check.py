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
    return Plan(is_dry=False, model=tmp_path, folder=tmp_path)


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


@pytest.mark.parametrize("words", [["--only", "job,lunch"], ["--only", "job"], ["--model", "/none such"]])
def test_what_it_cannot_do_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(words)
    assert "must be" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "job"])
def test_the_dry_run_goes_the_whole_way(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(["--dry-run", "--only", name])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["parts"][name]
    assert status == 0, found
    if name == "kernels":
        assert found["collected"] > 10
        return
    assert (found["checkpoints"], found["same_bits"]) == (3, True)
    assert (found["whole"]["num_attempts"], found["killed"]["num_attempts"]) == (1, 2)
    assert found["whole"]["determinism"] == "BITWISE"
    assert found["whole"]["last_loss"] < found["whole"]["first_loss"]
    assert set(found["scores"]) == {"base", "tuned"}
