"""What the operators' tests share: kernels to run, and the comparison with float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa, available_isas, force_isa

Run = Callable[..., Sequence[Tensor]]
"""(impl, *inputs) -> outputs."""


_impl = "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--isa")
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", chosen or available_isas(), indirect=True)
    if "kernels" in metafunc.fixturenames:
        triton = ["triton"] if importlib.util.find_spec("triton") else []
        metafunc.parametrize("kernels", chosen or [*available_isas(), *triton], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    force_isa(request.param)
    yield request.param
    force_isa(None)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, and Triton; `exact_as_eager` runs these kernels. Gives their `impl`."""
    global _impl  # noqa: PLW0603 - what `exact_as_eager` runs in this test
    _impl = "triton" if request.param == "triton" else "cpu"
    force_isa(None if request.param == "triton" else request.param)
    with numpy.errstate(over="ignore"):  # the interpreter's exp, where a GPU's gives infinity without a word
        yield _impl
    force_isa(None)
    _impl = "cpu"


def with_gradients(run: Run, impl: str, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that require one, for fixed random gradients of the outputs."""
    cast = [
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one
        for one in inputs
    ]
    outputs = list(run(impl, *cast))
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    learnt = [one for one in cast if one.requires_grad]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, learnt, weights)]


def assert_exact_as_eager(
    run: Run, inputs: Sequence[Tensor], dtype: torch.dtype, eager: Run | None = None
) -> None:
    """Outputs and gradients of the kernels are at most twice as far from float64 as plain torch's at that dtype.

    `eager` replaces the reference as what plain torch computes. A last bit of the greatest element, and a few of a
    float32 sum, are always allowed. Triton's interpreter is wrong for bfloat16: there float16 takes its place.
    """
    if _impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        dtype = torch.float16
    inputs = [
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one
        for one in inputs
    ]
    exact = with_gradients(run, "eager", inputs, torch.float64)
    ours = with_gradients(run, _impl, inputs, dtype)
    theirs = with_gradients(eager or run, "eager", inputs, dtype)
    eps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    for index, (want, got, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert got.shape == want.shape
        scale = want.abs().max() if want.numel() else torch.tensor(0.0)
        bound = 2 * (other.double() - want).norm() + eps * scale
        error = (got.double() - want).norm()
        assert error <= bound, f"output {index} is {error:.3g} off, allowed are {bound:.3g}"


@pytest.fixture
def exact_as_eager() -> Callable[..., None]:
    return assert_exact_as_eager


@pytest.fixture
def gradients() -> Callable[..., list[Tensor]]:
    return with_gradients


@pytest.fixture
def same_for_threads() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """A function's results have the same bits with one, two and three threads."""

    def check(compute: Callable[[], Sequence[Tensor]]) -> None:
        before = torch.get_num_threads()
        try:
            results: list[Any] = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(list(compute()))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for first, second in zip(results[0], other, strict=True):
                assert torch.equal(first, second)

    return check
