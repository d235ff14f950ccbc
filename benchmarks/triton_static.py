"""Compile every Triton kernel ahead of time for real GPUs, and read from the binaries what it takes of them.

`python benchmarks/triton_static.py` compiles each kernel in each configuration for sm_80, sm_90, sm_100 and gfx942 as
the runtime would (16-byte aligned pointers and strides), prints a table, writes results/triton_static.json and ends
with one line of JSON. No GPU is needed. `--targets sm_90,gfx942` compiles for some of them, `--only TEXT` the cases
whose name holds a text; then nothing is written. `--results FILE` writes another file. The exit code is 1 when a kernel
spills, is over a chip's limits, or multiplies matrices without matrix instructions. `triton_versions.py` runs it with
two versions of triton.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_static_cases import Case

RESULTS = Path(__file__).parent / "results" / "triton_static.json"


_WARP_GROUP_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A chip: how Triton names it, and what a program may take of it.

    Attributes:
        matrix_instruction: pattern of its matrix instructions in the assembly.
        thin_instruction: of those for tiles of fewer rows than the others take; none: there are no others.
        shared_bytes: most shared memory (LDS) of a program.
    """

    backend: str
    arch: int | str
    warp_size: int
    matrix_instruction: str
    shared_bytes: int
    registers: int = 255
    tensor_memory_columns: int = 0
    thin_instruction: str = ""

    def instruction_for(self, rows: int) -> str:
        """The pattern of the matrix instructions that a tile of so many rows should take."""
        return (
            self.thin_instruction
            if self.thin_instruction and rows < _WARP_GROUP_ROWS
            else self.matrix_instruction
        )


TARGETS: Mapping[str, Target] = {
    "sm_80": Target(
        backend="cuda", arch=80, warp_size=32, matrix_instruction=r"mma\.sync", shared_bytes=163 << 10
    ),
    "sm_90": Target(
        backend="cuda",
        arch=90,
        warp_size=32,
        matrix_instruction=r"wgmma\.mma_async",
        thin_instruction=r"mma\.sync",
        shared_bytes=227 << 10,
    ),
    "sm_100": Target(
        backend="cuda",
        arch=100,
        warp_size=32,
        matrix_instruction=r"tcgen05\.mma",
        thin_instruction=r"mma\.sync",
        shared_bytes=227 << 10,
        tensor_memory_columns=512,
    ),
    "gfx942": Target(
        backend="hip",
        arch="gfx942",
        warp_size=64,
        matrix_instruction="v_mfma",
        shared_bytes=64 << 10,
        registers=512,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one kernel takes: registers of a thread, bytes, columns of tensor memory, instructions."""

    case: str
    kernel: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instructions: int
    is_matmul: bool
    problems: tuple[str, ...] = ()


def compile_numbered(number: int, name: str) -> Usage:
    """Compile one of the cases by its number, as a kernel itself cannot be sent to another process."""
    return compile_case(_cases()[number], name)


def _cases() -> list[Case]:
    # Here, as importing the kernels settles whether they are interpreted or compiled.
    from triton_static_cases import cases

    return list(cases())


def gpu_target(name: str) -> Any:
    """Triton's own object for a target."""
    from triton.backends.compiler import GPUTarget

    target = TARGETS[name]
    return GPUTarget(target.backend, target.arch, target.warp_size)


def compile_case(case: Case, name: str) -> Usage:
    """Compile a case for a target and read its usage."""
    import triton
    from triton.compiler import ASTSource

    target = TARGETS[name]
    launch = case.launches.get(name, case.launches["*"])
    constants = {**launch.tiles, **case.constants}
    order = {argument: index for index, argument in enumerate(case.kernel.arg_names)}
    signature = {argument: case.types.get(argument, "constexpr") for argument in order}
    aligned = [argument for argument, kind in case.types.items() if argument in case.aligned or "*" in kind]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(order[argument],): value for argument, value in constants.items()},
        attrs={(order[argument],): [["tt.divisibility", 16]] for argument in aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=gpu_target(name), options=options)
    read = _nvidia_usage if target.backend == "cuda" else _amd_usage
    registers, spilled, assembly = read(compiled)
    usage = Usage(
        case=case.name,
        kernel=f"{case.op}.{case.kernel.__name__}",
        target=name,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        matrix_instructions=len(
            re.findall(target.instruction_for(case.left_rows or launch.tiles.get("BLOCK_M", 128)), assembly)
        ),
        is_matmul=case.is_matmul,
    )
    return replace(usage, problems=tuple(_problems(usage, target)))


def _nvidia_usage(compiled: Any) -> tuple[int, int, str]:
    """(registers, spilled bytes, PTX), the first two from cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [str(tool), "--dump-resource-usage", binary.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # A function's own line comes last. Spilled registers live in the stack frame or in local memory.
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)[-1]
    registers, stack, local = map(int, found)
    return registers, stack + local, compiled.asm["ptx"]


def _amd_usage(compiled: Any) -> tuple[int, int, str]:
    """(vector registers, spilled bytes, assembly), the first two from the kernel's metadata."""
    assembly = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[-1])

    spilled = 4 * (value("vgpr_spill_count") + value("sgpr_spill_count")) + value(
        "private_segment_fixed_size"
    )
    return value("vgpr_count"), spilled, assembly


def _problems(usage: Usage, target: Target) -> Iterator[str]:
    if usage.spilled_bytes:
        yield f"spills {usage.spilled_bytes} bytes"
    limits = {
        "registers": target.registers,
        "shared_bytes": target.shared_bytes,
        "tensor_memory_columns": target.tensor_memory_columns,
    }
    for name, limit in limits.items():
        if getattr(usage, name) > limit:
            yield f"{name} must be at most {limit}, got {getattr(usage, name)}"
    if usage.is_matmul and not usage.matrix_instructions:
        yield "multiplies matrices without matrix instructions"


def summary(usages: Sequence[Usage]) -> dict[str, Any]:
    """The keys of the last line."""
    return {
        "spills": sum(usage.spilled_bytes > 0 for usage in usages),
        "kernels": len({usage.kernel for usage in usages}),
        "configurations": len({usage.case for usage in usages}),
        "targets": sorted({usage.target for usage in usages}),
        "over_limits": sum(any("must be" in problem for problem in usage.problems) for usage in usages),
        "matmuls_without_matrix_instructions": sum(
            usage.is_matmul and not usage.matrix_instructions for usage in usages
        ),
    }


def write(path: Path, found: Mapping[str, Any], usages: Sequence[Usage]) -> None:
    """Write the results, unless the file says the same: then what `triton_versions.py` put beside it holds too."""
    import triton

    written = {"triton": triton.__version__, **found, "usages": [asdict(usage) for usage in usages]}
    # Through JSON, which knows no tuples.
    written = json.loads(json.dumps(written))
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("tritons", None)
    if before != written:
        path.write_text(json.dumps(written, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for real GPUs.")
    parser.add_argument("--targets", default=",".join(TARGETS), help="a few of them, by comma")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--results", default=RESULTS, type=Path, help="the file to write")
    arguments = parser.parse_args(argv)
    names = arguments.targets.split(",")
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {unknown[0]!r}")
    # Fusing of multiply and add is set, as its default changes between versions of Triton.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    chosen = [(number, case) for number, case in enumerate(_cases()) if arguments.only in case.name]
    work = [(number, name) for number, case in chosen for name in names if case.is_for(name)]
    if not work:
        parser.error(f"--only must be a part of a case's name, got {arguments.only!r}")
    with ProcessPoolExecutor() as pool:
        usages = list(pool.map(compile_numbered, *zip(*work, strict=True)))
    for usage in usages:
        print(
            f"{usage.target:7} {usage.case:58} {usage.registers:4} regs {usage.shared_bytes:7} B shared "
            f"{usage.tensor_memory_columns:4} tmem {usage.matrix_instructions:4} mma  "
            f"{'; '.join(usage.problems) or 'ok'}"
        )
    # Here, as importing the kernels settles whether they are interpreted or compiled.
    from triton_costs import worst_ratio

    ratio, whose = worst_ratio()
    print(f"most bytes against the least possible: {ratio:.3f}, {whose} (triton_costs.py prints all)")
    found = {**summary(usages), "worst_bytes_ratio": round(ratio, 3)}
    if not arguments.only and set(names) == set(TARGETS):
        write(arguments.results, found, usages)
    print(json.dumps(found))
    return 1 if any(usage.problems for usage in usages) else 0


if __name__ == "__main__":
    sys.exit(main())
