"""What the Triton kernels cost on paper: FLOPs, bytes against the least possible, and the roofline time of four chips.

`python benchmarks/triton_costs.py` prints each kernel at a shape of Llama-3.1-8B. Its test counts every load,
store and product in Triton's interpreter, and finds these bytes and FLOPs.

Bytes moved are those of the distinct elements that a kernel's programs read, and of those that they write: what its
programs read again is taken to come from the chip's cache; bytes requested count these too. Tables of int64 and
targets are left out. Products by the vendor's library are taken to move what they must, and no more: they count in the
bytes of a whole operator, against the least that any forward and backward pass would move.

M rows, K inputs, N outputs, R rank, Q the ranks of all projections, D hidden size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from luthier.kernels.gpu import Launches, covering, slice_height
from luthier.kernels.grouped_lora_linear import triton_kernels as grouped
from luthier.kernels.lora_linear import triton_kernels as lora
from luthier.kernels.lora_linear.triton import BACKWARD, FORWARD, Fused

FLOAT32 = 4
_TOKENS = 8192
LIBRARY = "library"
"""Instead of a kernel's name: a product by the vendor's library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Dense bfloat16 FLOPs and bytes of memory in a second, from the makers' data sheets."""

    name: str
    flops: float
    bandwidth: float


CHIPS: Mapping[str, Chip] = {
    "sm_80": Chip(name="A100 80GB SXM", flops=312e12, bandwidth=2.039e12),
    "sm_90": Chip(name="H100 SXM", flops=989e12, bandwidth=3.35e12),
    "sm_100": Chip(name="B200", flops=2250e12, bandwidth=8e12),
    "gfx942": Chip(name="MI300X", flops=1307e12, bandwidth=5.3e12),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One launch of a kernel.

    Attributes:
        flops: of its matrix products, two for each multiplication and addition.
        moved: bytes of the distinct elements that it reads and writes.
        requested: bytes of all its loads and stores.
        least: bytes of its operands and final results alone: without slices that are still to be added.
    """

    kernel: str
    flops: int = 0
    moved: int
    requested: int
    least: int

    @property
    def ratio(self) -> float:
        """Bytes moved against the least; of a kernel that only finishes another's work, see `ratios`."""
        return self.moved / self.least if self.least else 0.0

    def seconds(self, chip: Chip) -> float:
        """Roofline time."""
        return max(self.flops / chip.flops, self.moved / chip.bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A problem of `lora_linear_multi`, or of `grouped_lora_linear` with one output and several adapters.

    Attributes:
        outputs: of each projection.
        adapters: how many share the rows in equal parts, each with its own factors.
        item: bytes of an element.
        factor_item: bytes of an element of the factors.
    """

    rows: int
    inputs: int
    outputs: Sequence[int]
    rank: int
    adapters: int = 1
    item: int = 2
    factor_item: int = FLOAT32


def _tiles(table: Launches, target: str) -> Mapping[str, int]:
    return table.get(target, table["*"]).tiles


def _blocks(size: int, tile: int) -> int:
    return -(size // -tile)


def lora_costs(
    problem: Lora, target: str, *, dropout: bool = False, is_fused: tuple[bool, bool] | None = None
) -> Iterator[Cost]:
    """Forward and backward of `lora_linear_multi`, without biases; dropout moves nothing, but takes other kernels.

    `is_fused`: whether the products with the frozen weights are ours, forward and backward; else what the operator
    would choose on the target.
    """
    M, K, R, e = problem.rows, problem.inputs, problem.rank, problem.item
    Q = R * len(problem.outputs)
    yield _rounding(problem)
    yield _shrink((M, K, Q), e, _tiles(lora.SHRINK, target)) if dropout else _library(M, K, Q, e, e)
    for N in problem.outputs:
        if _is_fused(FORWARD, target, M * N * K, K) if is_fused is None else is_fused[0]:
            tiles = _tiles(lora.EXPAND, target)
            again = _blocks(N, tiles["BLOCK_N"]), _blocks(M, tiles["BLOCK_M"])
            yield _joint("expand_kernel", M, (K, R), N, e, again)
        else:
            yield _library(M, K, N, e, e)
            yield _library(M, R, N, e, 2 * e)  # adds to what stands there
    # Only NVIDIA's library gives these in float32 without rounding them.
    is_wide = target.startswith("sm_")
    for N in problem.outputs:
        yield _library(M, N, R, e, e)
        if is_wide:
            yield _library(R, M, N, e, FLOAT32)
        else:
            yield from _gram((M, N, R), e, _tiles(lora.GRAM, target), M, "sum_slices_kernel")
    if dropout or not is_wide:
        yield from _gram((M, K, Q), e, _tiles(lora.GRAM, target), M, "sum_slices_kernel")
    else:
        yield _library(Q, M, K, e, FLOAT32)
    inner = sum(problem.outputs)
    is_ours = _is_fused(BACKWARD, target, M * K * inner, inner) if is_fused is None else is_fused[1]
    if not (dropout or is_ours):
        for index, N in enumerate((*problem.outputs, Q)):
            yield _library(M, N, K, e, 2 * e if index else e)
        return
    tiles = _tiles(lora.DROPPED_INPUT_GRADIENT if dropout else lora.INPUT_GRADIENT, target)
    again = _blocks(K, tiles["BLOCK_N"]), _blocks(M, tiles["BLOCK_M"])
    yield _joint("input_gradient_kernel", M, (*problem.outputs, Q), K, e, again)


def least_bytes(problem: Lora) -> int:
    """What any forward and backward pass moves: dS must be whole before dx begins, so dy is read twice."""
    M, K, N, e = problem.rows, problem.inputs, sum(problem.outputs), problem.item
    count = problem.adapters
    factors = problem.rank * (K * len(problem.outputs) + N) * count
    forward = M * K + K * N + M * N
    backward = 2 * M * N + K * N + 2 * M * K
    return e * (forward + backward) + factors * (2 * problem.factor_item + FLOAT32)


def _rounding(problem: Lora) -> Cost:
    size = problem.rank * (problem.inputs * len(problem.outputs) + sum(problem.outputs))
    moved = size * (problem.factor_item + problem.item)
    return Cost(kernel="round_kernel", moved=moved, requested=moved, least=moved)


def _is_fused(table: Mapping[str, Fused], target: str, products: int, inner: int) -> bool:
    limits = table.get(target)
    return limits is not None and products >= limits.least and inner <= limits.most_inner


def _library(rows: int, inner: int, columns: int, e: int, e_out: int) -> Cost:
    """[rows, inner] times [inner, columns]."""
    moved = e * inner * (rows + columns) + e_out * rows * columns
    return Cost(kernel=LIBRARY, flops=2 * rows * inner * columns, moved=moved, requested=moved, least=moved)


def grouped_costs(problem: Lora, target: str = "*") -> Iterator[Cost]:
    """Forward and backward of `grouped_lora_linear`, its adapters with equal rows, each a multiple of 128."""
    (N,), M, K, R, e = problem.outputs, problem.rows, problem.inputs, problem.rank, problem.item
    count, own = problem.adapters, problem.rows // problem.adapters
    Q = R * count

    def apart(cost: Cost) -> Cost:
        """Of one adapter's rows, for all adapters."""
        total = {name: count * getattr(cost, name) for name in ("flops", "moved", "requested", "least")}
        return Cost(kernel=cost.kernel, **total)

    yield apart(_shrink((own, K, R), e, _tiles(grouped.SHRINK, target)))
    tiles = _tiles(grouped.EXPAND, target)
    again = _blocks(N, tiles["BLOCK_N"]), _blocks(M, tiles["BLOCK_M"])
    yield _joint("expand_kernel", M, (K,), N, e, again, low=(R, Q, own))
    yield apart(_shrink((own, N, R), e, _tiles(grouped.SHRINK, target)))
    for cost in _gram((own, N, R), e, _tiles(grouped.GRAM, target), M, "sum_kernel"):
        yield apart(cost)
    for cost in _gram((own, K, R), e, _tiles(grouped.GRAM, target), M, "sum_kernel"):
        yield apart(cost)
    tiles = _tiles(grouped.INPUT_GRADIENT, target)
    again = _blocks(K, tiles["BLOCK_N"]), _blocks(M, tiles["BLOCK_M"])
    yield _joint("input_gradient_kernel", M, (N,), K, e, again, low=(R, Q, own))


def _shrink(shape: tuple[int, int, int], e: int, tiles: Mapping[str, int]) -> Cost:
    """[M, K] times [K, Q]."""
    M, K, Q = shape
    left, right, results = e * M * K, e * K * Q, e * M * Q
    moved = left + right + results
    again = _blocks(Q, min(128, covering(Q, 16))), _blocks(M, tiles["BLOCK_M"])
    requested = left * again[0] + right * again[1] + results
    return Cost(kernel="shrink_kernel", flops=2 * M * K * Q, moved=moved, requested=requested, least=moved)


def _joint(
    kernel: str,
    rows: int,
    inner: Sequence[int],
    columns: int,
    e: int,
    again: tuple[int, int],
    low: tuple[int, int, int] = (0, 0, 1),
) -> Cost:
    """Several products of the same rows in one accumulator; `low`: rank, all ranks and rows of adapters in parts.

    An adapter's rows are a multiple of the tile's, so each of its factors is read once for each of its tiles.
    """
    rank, _, own = low
    terms = sum(inner)
    left, right = e * rows * (terms + rank), e * columns * terms
    factors = e * columns * rank
    tiles_of_one = _blocks(own * again[1], rows) if rank else 0
    count = rows // own if rank else 0
    results = e * rows * columns
    moved = left + right + factors * count + results
    requested = left * again[0] + right * again[1] + factors * count * tiles_of_one + results
    flops = 2 * rows * columns * (terms + rank)
    return Cost(kernel=kernel, flops=flops, moved=moved, requested=requested, least=moved)


def _gram(
    shape: tuple[int, int, int], e: int, tiles: Mapping[str, int], all_rows: int, sums: str
) -> Iterator[Cost]:
    """The slices of a product of transposed rows, of all rows or one adapter's, and their sum."""
    M, K, Q = shape
    x, low, result = e * M * K, e * M * Q, FLOAT32 * Q * K
    again = _blocks(Q, min(128, covering(Q, 16))), _blocks(K, tiles["BLOCK_N"])
    slices = _blocks(M, slice_height(all_rows, again[0] * again[1], tiles["BLOCK_M"]))
    yield Cost(
        kernel="gram_kernel",
        flops=2 * M * K * Q,
        moved=x + low + slices * result,
        requested=x * again[0] + low * again[1] + slices * result,
        least=x + low + result,
    )
    if slices > 1:
        yield _sum(sums, slices, Q * K)


def _sum(kernel: str, slices: int, size: int) -> Cost:
    """The sum of slices moves nothing that had to be moved."""
    moved = FLOAT32 * size * (slices + 1)
    return Cost(kernel=kernel, moved=moved, requested=moved, least=0)


def norm_costs(rows: int, dim: int, item: int = 2) -> Iterator[Cost]:
    """Forward and backward of `rms_norm`."""
    for kernel, passes in (("forward_kernel", 2), ("backward_kernel", 3)):
        streamed, inverse = passes * item * rows * dim, FLOAT32 * rows
        moved = streamed + item * dim + inverse
        yield Cost(kernel=kernel, moved=moved, requested=streamed + item * dim * rows + inverse, least=moved)


def gated_costs(rows: int, size: int, item: int = 2) -> Iterator[Cost]:
    """Forward and backward of a gated activation."""
    for kernel, passes in (("forward_kernel", 3), ("backward_kernel", 5)):
        moved = passes * item * rows * size
        yield Cost(kernel=kernel, moved=moved, requested=moved, least=moved)


def rope_cost(tokens: int, heads: int, head_dim: int, rotary: int, item: int = 2) -> Cost:
    """One call of `rope`."""
    from luthier.kernels.rope.triton import launch_of

    turned, angles = 2 * item * tokens * heads * head_dim, 2 * item * tokens * rotary
    blocks = _blocks(heads, launch_of(heads, head_dim, rotary).tiles["BLOCK_H"])
    moved = turned + angles
    return Cost(kernel="rope_kernel", moved=moved, requested=turned + angles * blocks, least=moved)


def loss_cost(rows: int, vocab: int, item: int = 2) -> Cost:
    """Loss and gradient of rows of logits, which stand in memory; the second look at a row comes from the cache."""
    row = item * vocab
    moved = rows * (2 * row + FLOAT32)
    return Cost(kernel="row_kernel", moved=moved, requested=moved + rows * (row + item), least=moved)


def ratios(costs: Sequence[Cost]) -> dict[str, float]:
    """Bytes moved against the least, of each kernel with the sums that finish its work."""
    found: dict[str, tuple[int, int]] = {}
    last = ""
    for cost in costs:
        last = cost.kernel if cost.least else last
        moved, least = found.get(last, (0, 0))
        found[last] = (moved + cost.moved, least + cost.least)
    return {kernel: moved / least for kernel, (moved, least) in found.items()}


def lora_problems() -> Iterator[tuple[str, Lora]]:
    """The linear layers of Llama-3.1-8B at 8,192 tokens, and the output of its attention for many adapters."""
    for rank in (8, 16, 32, 64):
        for name, outputs in {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)}.items():
            yield name, Lora(rows=_TOKENS, inputs=4096, outputs=outputs, rank=rank)
        for adapters in (1, 64):
            yield "grouped", Lora(rows=_TOKENS, inputs=4096, outputs=(4096,), rank=rank, adapters=adapters)


def problems(target: str) -> Iterator[tuple[str, list[Cost]]]:
    """Every operator at 8,192 tokens of Llama-3.1-8B."""
    M = _TOKENS
    for name, problem in lora_problems():
        rank, adapters = problem.rank, problem.adapters
        if name == "grouped":
            label = f"grouped_lora_linear, {adapters} of rank {rank}"
            yield label, list(grouped_costs(problem, target))
            continue
        for dropout in (False, True):
            label = f"lora_linear {name}, rank {rank}{', dropout' if dropout else ''}"
            yield label, list(lora_costs(problem, target, dropout=dropout))
    yield "rms_norm", list(norm_costs(M, 4096))
    yield "swiglu", list(gated_costs(M, 14336))
    yield "rope", [rope_cost(M, 32, 128, 128)]
    yield "linear_cross_entropy", [loss_cost(1024, 128256)]


def worst_operator() -> tuple[float, str]:
    """The greatest ratio of a whole pass of a LoRA operator, forward and backward, to the least, and whose it is."""

    def ratio(name: str, problem: Lora, target: str) -> float:
        costs = grouped_costs(problem, target) if name == "grouped" else lora_costs(problem, target)
        return sum(cost.moved for cost in costs) / least_bytes(problem)

    return max(
        (ratio(name, problem, target), f"{name}, {problem.adapters} of rank {problem.rank} on {target}")
        for target in CHIPS
        for name, problem in lora_problems()
    )


def worst_ratio() -> tuple[float, str]:
    """The greatest ratio of bytes moved to the least, over all kernels, shapes and chips, and whose it is."""
    return max(
        (ratio, f"{kernel} of {name} on {target}")
        for target in CHIPS
        for name, costs in problems(target)
        for kernel, ratio in ratios(costs).items()
    )


def main() -> int:
    """Print every kernel; returns the exit code."""
    print(f"{'8,192 tokens of Llama-3.1-8B':64}{'GFLOP':>9}{'MB':>8}{'x least':>8}{'x asked':>8}   roofline")
    for target, chip in CHIPS.items():
        for name, costs in problems(target):
            together = ratios(costs)
            for cost in costs:
                print(
                    f"{chip.name:14} {name + ': ' + cost.kernel.removesuffix('_kernel'):48} "
                    f"{cost.flops / 1e9:9.1f}{cost.moved / 1e6:8.1f}{together.get(cost.kernel, 0):8.3f}"
                    f"{cost.requested / cost.moved:8.1f}{cost.seconds(chip) * 1e6:9.1f} us"
                )
    ratio, whose = worst_operator()
    print(f"worst operator, forward and backward: {ratio:.3f}, {whose}")
    ratio, whose = worst_ratio()
    print(f"worst: {ratio:.3f}, {whose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
