"""Forward and gradient of `linear_cross_entropy` against float64, on every instruction set of this machine."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa, available_isas, force_isa
from luthier.kernels.linear_cross_entropy import linear_cross_entropy
from luthier.kernels.linear_cross_entropy.cpu import linear_cross_entropy_cpu
from luthier.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    force_isa(request.param)
    yield request.param
    force_isa(None)


def problem(rows: int, dim: int, vocab: int, dtype: torch.dtype, peak: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    hidden = (torch.randn(rows, dim, generator=generator) * peak).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator) * 0.2).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[::3] = -100
    target[-1:] = vocab - 1
    return [hidden, weight, target]


def run(impl: str, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, impl=impl).loss_sum  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss * 0.5, hidden)
    return loss.detach().double(), grad.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 129])
@pytest.mark.parametrize(("dim", "vocab", "peak"), [(64, 512, 1.0), (33, 777, 20.0)])
def test_cpu_is_no_less_exact_than_eager(
    isa: Isa, dtype: torch.dtype, rows: int, dim: int, vocab: int, peak: float
) -> None:
    inputs = problem(rows, dim, vocab, dtype, peak)
    exact = run("eager", inputs[0].double(), inputs[1].double(), inputs[2])
    # One order of summation may be lucky where logits are large, so eager's error is its worst over a few.
    orders = [torch.randperm(dim, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    eager = [run("eager", inputs[0][:, order], inputs[1][:, order], inputs[2]) for order in orders]
    eager = [(loss, grad[:, order.argsort()]) for order, (loss, grad) in zip(orders, eager, strict=True)]
    ours = run("cpu", *inputs)
    eps = torch.finfo(dtype).eps
    for want, got, *theirs in zip(exact, ours, *eager, strict=True):
        scale = want.abs().max() if want.numel() else torch.tensor(0.0)
        assert (got - want).norm() <= 2 * max((their - want).norm() for their in theirs) + eps * scale


def test_cpu_of_ignored_rows_is_zero(isa: Isa) -> None:
    hidden, weight, target = problem(9, 16, 100, torch.bfloat16)
    loss, grad = run("cpu", hidden, weight, torch.full_like(target, -100))
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_bits_do_not_depend_on_threads(isa: Isa, dtype: torch.dtype) -> None:
    inputs = problem(200, 33, 777, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", *inputs))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpu_propagates_non_finite_rows_alone(isa: Isa, value: float) -> None:
    hidden, weight, target = problem(20, 16, 300, torch.bfloat16)
    with torch.no_grad():
        hidden[4, 3] = value
    loss, grad = run("cpu", hidden, weight, target)
    assert not loss.isfinite()
    assert grad[4].isnan().any()
    assert grad[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_takes_strided_and_misaligned_inputs(isa: Isa, dtype: torch.dtype) -> None:
    hidden, weight, target = problem(20, 32, 300, dtype)
    want = run("cpu", hidden, weight, target)
    strided = torch.empty(300, 37, dtype=dtype)[:, 1:33].copy_(weight)
    for hidden_view, weight_view in [
        (hidden.detach().T.contiguous().T, strided),
        (hidden, weight.T.clone().T),
    ]:
        got = run("cpu", hidden_view, weight_view, target)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_cpu_op_passes_opcheck() -> None:
    hidden, weight, target = problem(7, 16, 100, torch.float32)
    torch.library.opcheck(linear_cross_entropy_cpu, (hidden, weight, target, -100, True))
    strided = hidden.detach().T.contiguous().T.requires_grad_()
    torch.library.opcheck(linear_cross_entropy_cpu, (strided, weight, target, -100, True))


def test_reference_gradient_is_its_derivative() -> None:
    hidden, weight, target = problem(4, 5, 11, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_reference(h, w, target), (hidden, weight.requires_grad_())
    )


def test_auto_trains_the_head_through_eager() -> None:
    hidden, weight, target = problem(7, 16, 100, torch.float32)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, target).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    with pytest.raises(ValueError, match="requires_grad=True"):
        linear_cross_entropy(hidden, weight, target, impl="cpu")


def test_linear_cross_entropy_refuses_wrong_inputs() -> None:
    hidden, weight, target = problem(7, 16, 100, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden.double(), weight.double(), target, impl="cpu")
    with pytest.raises(ValueError, match=r"\(100, 15\)"):
        linear_cross_entropy(hidden, weight[:, 1:], target)
    with pytest.raises(ValueError, match="int32"):
        linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match="100"):
        linear_cross_entropy(hidden, weight, target + 1)
    with pytest.raises(ValueError, match="fast"):
        linear_cross_entropy(hidden, weight, target, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neon"):
        force_isa("neon")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "order", ["import torch, luthier.kernels._core", "import luthier.kernels._core, torch"]
)
def test_process_maps_one_openmp_runtime(order: str) -> None:
    script = f"{order}\ntorch.ones(9, 9) @ torch.ones(9, 9)\nprint(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}) == 1
