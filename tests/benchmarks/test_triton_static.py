"""The ahead-of-time compilation: it reads what binaries take, and refuses what it should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_static.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    # The operators' tests run Triton's interpreter in this process.
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=surroundings, check=False
    )


def test_kernels_are_compiled_for_chips_that_are_not_here() -> None:
    done = run("--targets", "sm_90,gfx942", "--only", "lora_linear: expand")
    assert done.returncode == 0, done.stderr
    *lines, ratio, last = done.stdout.splitlines()
    # One kernel takes any chip, the other tiles by Hopper's copy engine.
    assert [line.split()[:2] for line in lines] == [
        ["sm_90", "lora_linear:"],
        ["sm_90", "lora_linear:"],
        ["sm_90", "grouped_lora_linear:"],
        ["gfx942", "grouped_lora_linear:"],
    ]
    assert ratio.startswith("most bytes against the least possible: ")
    found = json.loads(last)
    assert found["spills"] == found["matmuls_without_matrix_instructions"] == 0
    assert (found["kernels"], found["configurations"], found["targets"]) == (2, 3, ["gfx942", "sm_90"])
    assert 1 <= found["worst_bytes_ratio"] <= 1.15


def test_gradients_of_few_rows_spill_nothing_on_blackwell() -> None:
    # INT8 did in four warps.
    done = run("--targets", "sm_100", "--only", "dequantise: gradient, 64 rows")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["spills"], found["configurations"], found["targets"]) == (0, 2, ["sm_100"])


def test_wrong_targets_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    import triton_static

    with pytest.raises(SystemExit) as left:
        triton_static.main(["--targets", "sm_1"])
    assert left.value.code == 2
    assert "--targets must be of sm_80, sm_90, sm_100, gfx942, got 'sm_1'" in capsys.readouterr().err


def test_wrong_cases_are_named() -> None:
    done = run("--only", "nothing")
    assert done.returncode == 2
    assert "--only must be a part of a case's name, got 'nothing'" in done.stderr


def test_spills_limits_and_missing_matrix_instructions_are_problems() -> None:
    import triton_static

    good = triton_static.Usage(
        case="c",
        kernel="k",
        target="sm_90",
        registers=255,
        spilled_bytes=0,
        shared_bytes=227 << 10,
        tensor_memory_columns=0,
        matrix_instructions=4,
        is_matmul=True,
    )
    target = triton_static.TARGETS["sm_90"]
    assert list(triton_static._problems(good, target)) == []
    assert list(triton_static._problems(replace(good, spilled_bytes=8), target)) == ["spills 8 bytes"]
    over = list(triton_static._problems(replace(good, shared_bytes=(227 << 10) + 1), target))
    assert over == ["shared_bytes must be at most 232448, got 232449"]
    bare = list(triton_static._problems(replace(good, matrix_instructions=0), target))
    assert bare == ["multiplies matrices without matrix instructions"]
    assert list(triton_static._problems(replace(good, matrix_instructions=0, is_matmul=False), target)) == []


def test_summaries_of_other_versions_stay_while_nothing_else_changes(tmp_path: Path) -> None:
    import triton_static

    path = tmp_path / "results.json"
    triton_static.write(path, {"spills": 0}, [])
    before = json.loads(path.read_text())
    assert before["spills"] == 0
    path.write_text(json.dumps({"tritons": {"3.7.1": {}}, **before}))
    triton_static.write(path, {"spills": 0}, [])
    assert json.loads(path.read_text())["tritons"] == {"3.7.1": {}}
    triton_static.write(path, {"spills": 1}, [])
    assert json.loads(path.read_text()) == {**before, "spills": 1}


def test_tiles_of_few_rows_take_the_instructions_of_a_warp() -> None:
    from triton_static import TARGETS

    assert TARGETS["sm_90"].instruction_for(64).startswith("wgmma")
    assert TARGETS["sm_90"].instruction_for(16).startswith("mma")
    assert TARGETS["gfx942"].instruction_for(16) == TARGETS["gfx942"].instruction_for(64)
