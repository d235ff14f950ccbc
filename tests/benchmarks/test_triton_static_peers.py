"""The comparison with peers: what their host code launches is compiled as it is, and what fails is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_static_peers as peers  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_static import Usage  # noqa: E402
from triton_static_cases import cases  # noqa: E402
from triton_static_peer_cases import Comparison, case_of, comparisons, launches  # noqa: E402

USAGE = Usage(
    case="c",
    kernel="k",
    target="sm_90",
    registers=40,
    spilled_bytes=0,
    shared_bytes=1024,
    tensor_memory_columns=0,
    matrix_instructions=4,
    is_matmul=True,
)
OURS = peers.Compiled(name="mine", target="sm_90", num_warps=8, usage=USAGE)
SPILLS = replace(USAGE, kernel="p.k", registers=255, spilled_bytes=8, problems=("spills 8 bytes",))
THEIRS = peers.Compiled(name="theirs", target="sm_90", num_warps=4, usage=SPILLS)
REFUSED = replace(THEIRS, name="another", usage=None, failure="CompilationError: no such chip")
ROWS = [
    peers.Row(peer="liger-kernel", ours=OURS, theirs=THEIRS),
    peers.Row(peer="liger-kernel", ours=OURS, theirs=REFUSED),
]


def run_python(*arguments: str) -> str:
    # The operators' tests run Triton's interpreter in this process.
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings["PYTHONPATH"] = str(Path(peers.__file__).parent)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_table_has_both_sides_in_each_column() -> None:
    head, line, refused = peers.table(ROWS)
    assert head.split()[:4] == ["target", "problem", "warps", "registers"]
    expected = "sm_90 theirs 8 | 4 40 | 255 0 | 8 1024 | 1024 0 | 0 4 | 4 p.k theirs: spills 8 bytes"
    assert " ".join(line.split()) == expected
    assert " ".join(refused.split()).startswith("sm_90 another 8 | 4 40 | - 0 | - 1024 | - 0 | - 4 | -")
    assert refused.endswith("liger-kernel  theirs: does not compile: CompilationError: no such chip")
    assert line.index("p.k") == refused.index("liger-kernel") == head.index("their kernel")


def test_summary_counts_each_kernel_once_and_keeps_failures() -> None:
    found = peers.summary(ROWS)
    assert found["comparisons"] == 2
    assert found["ours"] == {"compiled": 1, "not_compiled": 0, "spills": 0, "over_limits": 0}
    assert found["liger-kernel"] == {"compiled": 1, "not_compiled": 1, "spills": 1, "over_limits": 0}
    assert found["cut-cross-entropy"]["compiled"] == 0


REFUSING = """
import sys
from types import SimpleNamespace as Named
import triton
import triton.language as tl
from triton_static_peers import compiled

@triton.jit
def kernel(out, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 32, "BLOCK must be 32")
    tl.store(out + tl.arange(0, BLOCK), 1.0)

launches = {"*": Named(tiles={}, num_warps=2, num_stages=2)}
for block in (64, 32):
    case = Named(op="peer", name="stores", kernel=kernel, launches=launches, types={"out": "*bf16"},
                 aligned=frozenset(), constants={"BLOCK": block}, is_matmul=False, left_rows=None)
    found = compiled(case, "sm_90")
    print(found.num_warps, found.usage and found.usage.kernel, found.failure, sep=";")
"""


def test_kernel_that_does_not_compile_is_an_outcome(tmp_path: Path) -> None:
    # In a file, as Triton reads the kernel's source.
    script = tmp_path / "refusing.py"
    script.write_text(REFUSING)
    assert run_python(str(script)).splitlines() == [
        "2;None;CompileTimeAssertionFailure: BLOCK must be 32",
        "2;peer.kernel;",
    ]


CRASHING = """
import os
from triton_static_peers import Compiled, compile_all

def compile_one(task):
    if task[0] == "crashes":
        os._exit(1)
    return Compiled(name=task[0], target=task[1])

tasks = [("a", "sm_90"), ("crashes", "sm_90"), ("b", "sm_90")]
for task, found in compile_all(tasks, compile_one).items():
    assert (found.name, found.target) == task
    print(found.name, found.failure, sep=";")
"""


def test_compiler_that_ends_its_process_is_an_outcome() -> None:
    lines = run_python("-c", CRASHING).splitlines()
    assert sorted(lines) == ["a;", "b;", "crashes;the compiler ended its process"]


def kernel(x, scale, stride, one, rows, nothing, given=32, BLOCK: tl.constexpr = 8):  # type: ignore[no-untyped-def]
    pass


def host_code(warps: int) -> None:
    """As peers write it: a kernel whose constants are chosen by heuristics, launched on tensors."""
    chosen: Any = triton.heuristics({"BLOCK": lambda values: values["rows"] * 2})(JITFunction(kernel))
    x = torch.empty(4, 4, dtype=torch.bfloat16)
    chosen[(1,)](x, 2.0, 48, 1, rows=24, nothing=None, num_warps=warps)


def test_launch_is_recorded_as_the_runtime_would_specialise_it() -> None:
    [(found, arguments)] = launches(lambda: host_code(16))
    comparison = Comparison(ours="mine", peer="peer", problem="p", run=lambda: None, is_matmul=True)
    case = case_of(comparison, "sm_90", found, arguments)
    assert found.__name__ == "kernel"
    assert case.types == {"x": "*bf16", "scale": "fp32", "stride": "i32", "rows": "i32", "given": "i32"}
    assert case.constants == {"one": 1, "nothing": None, "BLOCK": 48}
    assert case.aligned == {"stride", "given"}
    assert (case.op, case.name, case.is_matmul) == ("peer", "p", True)


@pytest.mark.parametrize(("target", "num_stages"), [("sm_100", 3), ("gfx942", 2)])
def test_options_are_those_of_the_launch_or_the_backend(target: str, num_stages: int) -> None:
    [(found, arguments)] = launches(lambda: host_code(16))
    comparison = Comparison(ours="mine", peer="peer", problem="p", run=lambda: None)
    launch = case_of(comparison, target, found, arguments).launches["*"]
    assert (launch.num_warps, launch.num_stages) == (16, num_stages)


def test_every_comparison_is_with_a_case_of_ours() -> None:
    found = list(comparisons())
    assert {one.ours for one in found} <= {case.name for case in cases() if not case.targets}
    assert {one.peer for one in found} == set(peers.PEERS)
    assert len({one.problem for one in found}) == len(found)


def test_comparison_runs_in_environments_with_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []

    def run_each(script: Path, options: Sequence[str], requirements: Sequence[str]) -> tuple[int, Any]:
        called.append((script.name, *options, *requirements))
        return 0, {"comparisons": 96}

    monkeypatch.setattr(peers, "run_each", run_each)
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "results.json")
    assert peers.main(["--targets", "sm_90"]) == 0
    assert not peers.RESULTS.exists()
    assert peers.main([]) == 0
    assert json.loads(peers.RESULTS.read_text()) == {"comparisons": 96}
    [some, _] = called
    assert some[:4] == ("triton_static_peers.py", "--here", "--targets", "sm_90")
    assert {one.partition("==")[0] for one in some[4:]} == {*peers.PEERS, "packaging"}


def test_unknown_target_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--targets", "sm_1"])
    assert "--targets must be of sm_80, sm_90, sm_100, gfx942, got 'sm_1'" in capsys.readouterr().err
