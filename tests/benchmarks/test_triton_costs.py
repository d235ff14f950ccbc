"""The cost model against what the kernels do: every load, store and product of theirs is counted."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.runtime.interpreter")

import triton_costs  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton_costs import Cost, Lora  # noqa: E402

from luthier.kernels.gated_activation import swiglu  # noqa: E402
from luthier.kernels.grouped_lora_linear import LoraAdapter, Segment, grouped_lora_linear  # noqa: E402
from luthier.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from luthier.kernels.lora_linear import Dropout, Projection, lora_linear_multi  # noqa: E402
from luthier.kernels.rms_norm import rms_norm  # noqa: E402
from luthier.kernels.rope import rope  # noqa: E402

Counts = dict[str, Counter[str]]
ALIGNED = Lora(rows=256, inputs=128, outputs=(256,), rank=16, factor_item=2)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """FLOPs, bytes moved and requested of each kernel that the interpreter runs meanwhile."""
    found: Counts = defaultdict(Counter)
    touched: dict[str, list[Any]] = {}
    builder = interpreter.interpreter_builder
    plain = {
        name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_dot")
    }
    running: list[str] = [""]

    def note(kind: str, pointers: Any, mask: Any) -> None:
        item = pointers.get_element_ty().primitive_bitwidth // 8
        if pointers.get_element_ty().is_floating():
            addresses = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)].ravel()
            found[running[0]]["requested"] += item * addresses.size
            touched.setdefault(f"{kind}{item}", []).append(addresses)

    def load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        note("load", pointers, mask)
        return plain["create_masked_load"](pointers, mask, *rest, **options)

    def store(pointers: Any, value: Any, mask: Any, policy: Any) -> Any:
        note("store", pointers, mask)
        return plain["create_masked_store"](pointers, value, mask, policy)

    def dot(a: Any, b: Any, *rest: Any) -> Any:
        found[running[0]]["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return plain["create_dot"](a, b, *rest)

    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *arguments: Any, **keywords: Any) -> None:
        running[0] = self.fn.__name__
        touched.clear()
        launch(self, *arguments, **keywords)
        for key, addresses in touched.items():
            found[running[0]]["moved"] += int(key[-1]) * numpy.unique(numpy.concatenate(addresses)).size

    monkeypatch.setattr(builder, "create_masked_load", load, raising=False)
    monkeypatch.setattr(builder, "create_masked_store", store, raising=False)
    monkeypatch.setattr(builder, "create_dot", dot, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).half().requires_grad_()


def check(found: Counts, costs: Sequence[Cost], *, aligned: bool = True) -> None:
    assert set(found) == {cost.kernel for cost in costs} - {triton_costs.LIBRARY}
    for kernel, counts in found.items():
        of_kernel = [cost for cost in costs if cost.kernel == kernel]
        assert counts["moved"] == sum(cost.moved for cost in of_kernel), kernel
        for name in ("requested", "flops"):
            modelled = sum(getattr(cost, name) for cost in of_kernel)
            # A tile beyond an operand's end reads rows again, and multiplies them or zeros.
            assert counts[name] == modelled if aligned else counts[name] >= modelled, (kernel, name)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("problem", "aligned"),
    [
        (ALIGNED, True),
        (Lora(rows=256, inputs=128, outputs=(256, 256), rank=64, factor_item=2), True),
        (Lora(rows=300, inputs=100, outputs=(70, 36), rank=9, factor_item=2), False),
        (Lora(rows=70, inputs=20, outputs=(40,), rank=130, factor_item=2), False),
    ],
)
def test_lora_linear(problem: Lora, aligned: bool, dropout: float, counted: Counts) -> None:
    projections = [
        Projection(
            weight=random(size, problem.inputs).detach(),
            a=random(problem.rank, problem.inputs),
            b=random(size, problem.rank),
            scale=1.0,
        )
        for size in problem.outputs
    ]
    given = Dropout(probability=dropout, seed=1)
    x = random(problem.rows, problem.inputs)
    outputs = lora_linear_multi(x, projections, dropout=given, impl="triton")
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    # Tensor descriptors take rows of a multiple of 16 bytes; the rest is what the interpreter always fuses.
    described = all(size % 8 == 0 for size in (problem.inputs, *problem.outputs))
    costs = triton_costs.lora_costs(problem, "*", dropout=dropout > 0, is_fused=(described, True))
    check(counted, list(costs), aligned=aligned)


@pytest.mark.parametrize(
    ("rows", "adapters", "rank", "aligned"),
    [(256, 1, 16, True), (512, 2, 16, True), (256, 2, 64, True), (256, 4, 9, False)],
)
def test_grouped_lora_linear(rows: int, adapters: int, rank: int, aligned: bool, counted: Counts) -> None:
    problem = Lora(rows=rows, inputs=128, outputs=(256,), rank=rank, adapters=adapters)
    factors = [
        LoraAdapter(a=random(rank, 128), b=random(256, rank), scale=1.0, dropout=0.0) for _ in range(adapters)
    ]
    segments = [Segment(num_rows=rows // adapters, adapter=index) for index in range(adapters)]
    output = grouped_lora_linear(
        random(rows, 128), random(256, 128).detach(), None, factors, segments, impl="triton"
    )
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
    check(counted, list(triton_costs.grouped_costs(problem)), aligned=aligned)


STREAMED: dict[str, tuple[Callable[[], torch.Tensor], list[Cost]]] = {
    "rms_norm": (
        lambda: rms_norm(random(7, 100), random(100).detach(), 1e-5, impl="triton"),
        list(triton_costs.norm_costs(7, 100)),
    ),
    "swiglu": (
        lambda: swiglu(random(7, 1100), random(7, 1100), impl="triton"),
        list(triton_costs.gated_costs(7, 1100)),
    ),
    "rope": (
        lambda: rope(random(7, 40, 96), random(7, 72).detach(), random(7, 72).detach(), impl="triton"),
        [triton_costs.rope_cost(7, 40, 96, 72)] * 2,
    ),
    "linear_cross_entropy": (
        lambda: (
            linear_cross_entropy(
                random(9, 20), random(5000, 20).detach(), torch.arange(9), impl="triton"
            ).loss_sum
        ),
        [triton_costs.loss_cost(9, 5000)],
    ),
}


@pytest.mark.parametrize("op", STREAMED)
def test_operators_of_rows(op: str, counted: Counts) -> None:
    run, costs = STREAMED[op]
    output = run()
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
    check(counted, costs)


def test_slices_count_against_a_kernel_and_so_do_the_sums_that_finish_it() -> None:
    costs = list(triton_costs.lora_costs(ALIGNED, "sm_90", dropout=True, is_fused=(True, True)))
    kernels = [cost.kernel for cost in costs]
    gram, total = costs[kernels.index("gram_kernel")], costs[kernels.index("sum_slices_kernel")]
    found = triton_costs.ratios(costs)
    assert found["gram_kernel"] == (gram.moved + total.moved) / gram.least > 1
    assert found["expand_kernel"] == 1


def test_an_operator_is_held_against_the_least_that_any_pass_moves() -> None:
    problem = Lora(rows=1000, inputs=100, outputs=(50,), rank=10)
    big = 2 * (1000 * 100 * 3 + 1000 * 50 * 3 + 2 * 100 * 50)
    assert triton_costs.least_bytes(problem) == big + 10 * 150 * 12
    # The library's products for dS and dB each read dy, where one pass over it would do; and the others read x again.
    costs = triton_costs.lora_costs(problem, "sm_90", is_fused=(True, True))
    moved = sum(cost.moved for cost in costs)
    assert moved > triton_costs.least_bytes(problem) + 2 * 1000 * 50


def test_products_are_the_librarys_where_nothing_was_measured() -> None:
    problem = Lora(rows=8192, inputs=4096, outputs=(4096,), rank=16)
    kernels = {
        target: {cost.kernel for cost in triton_costs.lora_costs(problem, target)}
        for target in triton_costs.CHIPS
    }
    assert kernels["sm_90"] == {
        "round_kernel",
        triton_costs.LIBRARY,
        "expand_kernel",
        "input_gradient_kernel",
    }
    assert kernels["sm_80"] == {"round_kernel", triton_costs.LIBRARY}
    # AMD's library would round dA and dB.
    assert kernels["gfx942"] == {"round_kernel", triton_costs.LIBRARY, "gram_kernel", "sum_slices_kernel"}


def test_the_worst_ratios_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    ratio, whose = triton_costs.worst_ratio()
    worst, operator = triton_costs.worst_operator()
    assert min(ratio, worst) > 1
    assert triton_costs.main() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"worst operator, forward and backward: {worst:.3f}, {operator}",
        f"worst: {ratio:.3f}, {whose}",
    ]


def test_roofline_is_the_slower_of_products_and_memory() -> None:
    chip = triton_costs.CHIPS["sm_90"]
    assert Cost(kernel="k", flops=989, moved=1, requested=1, least=1).seconds(chip) == 1e-12
    assert Cost(kernel="k", moved=335, requested=1, least=1).seconds(chip) == pytest.approx(1e-10)
