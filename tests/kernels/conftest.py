"""What the operators' tests share: kernels to run, and the comparison with float64."""

from __future__ import annotations

import importlib.util
import os
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
        metafunc.parametrize("kernels", chosen or [*available_isas(), *triton_parameters()], indirect=True)
    if "triton_kernels" in metafunc.fixturenames:
        metafunc.parametrize("triton_kernels", [] if chosen else triton_parameters(), indirect=True)


def triton_device() -> str:
    """Where Triton's kernels run here: on a GPU, or in Triton's interpreter on tensors in main memory."""
    return "cuda" if torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET") else "cpu"


def triton_parameters() -> list[Any]:
    """The kernels of Triton as a parameter, marked `gpu` where they are to run on one; none without the package."""
    if importlib.util.find_spec("triton") is None:
        return []
    return [pytest.param("triton", marks=[pytest.mark.gpu] if triton_device() == "cuda" else [])]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    force_isa(request.param)
    yield request.param
    force_isa(None)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine, and Triton; `exact_as_eager` runs these kernels. Gives their `impl`."""
    yield from _running(request)


@pytest.fixture
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `kernels`, of Triton alone."""
    yield from _running(request)


def few_rows(kernels: str, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape, with nine rows at most where Triton's interpreter runs kernels that take each row in a program.

    They know of no other row, and the interpreter takes milliseconds for each: nine tell what hundreds do.
    """
    return (min(shape[0], 9), *shape[1:]) if is_interpreted(kernels) else shape


def is_interpreted(kernels: str) -> bool:
    """Whether these kernels run in Triton's interpreter."""
    return kernels == "triton" and triton_device() == "cpu"


def _running(request: pytest.FixtureRequest) -> Iterator[str]:
    global _impl  # noqa: PLW0603 - what `exact_as_eager` runs in this test
    if request.param == "triton" and triton_device() == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is a GPU, but torch cannot use it: TRITON_INTERPRET=1 runs Triton's interpreter")
    _impl = "triton" if request.param == "triton" else "cpu"
    force_isa(None if request.param == "triton" else request.param)
    with numpy.errstate(over="ignore"):  # the interpreter's exp, where a GPU's gives infinity without a word
        yield _impl
    force_isa(None)
    _impl = "cpu"


def with_gradients(
    run: Run, impl: str, inputs: Sequence[Tensor], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Outputs, then the gradients of the inputs that require one, for fixed random gradients of the outputs.

    Computed on the device; all come back to the processor.
    """
    moved = [one.detach().to(device) for one in inputs]
    cast = [one.to(dtype) if one.is_floating_point() else one for one in moved]
    for one, given in zip(cast, inputs, strict=True):
        one.requires_grad_(given.requires_grad)
    outputs = list(run(impl, *cast))
    generator = torch.Generator().manual_seed(5)
    # Drawn on the processor, so that they are the same for every device.
    drawn = [torch.randn(output.shape, generator=generator) for output in outputs]
    weights = [one.to(output) for one, output in zip(drawn, outputs, strict=True)]
    learnt = [one for one in cast if one.requires_grad]
    found = [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, learnt, weights)]
    return [one.cpu() for one in found]


def assert_exact_as_eager(
    run: Run, inputs: Sequence[Tensor], dtype: torch.dtype, eager: Run | None = None
) -> None:
    """Outputs and gradients of the kernels are at most twice as far from float64 as plain torch's at that dtype.

    `eager` replaces the reference as what plain torch computes. A last bit of the greatest element, and a few of all
    elements in float32, are always allowed: how exact torch's own float32 sums are is the luck of a processor. Where
    Triton's kernels run on a GPU, so does eager; float64 stays on the processor. Triton's interpreter is wrong for
    bfloat16: there float16 takes its place.
    """
    device = triton_device() if _impl == "triton" else "cpu"
    if _impl == "triton" and dtype == torch.bfloat16 and device == "cpu":
        dtype = torch.float16
    inputs = [
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one
        for one in inputs
    ]
    exact = with_gradients(run, "eager", inputs, torch.float64)
    ours = with_gradients(run, _impl, inputs, dtype, device)
    theirs = with_gradients(eager or run, "eager", inputs, dtype, device)
    eps, few = torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps
    for index, (want, got, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert got.shape == want.shape
        scale = want.abs().max() if want.numel() else torch.tensor(0.0)
        bound = 2 * (other.double() - want).norm() + (eps + few) * scale + few * want.norm()
        error = (got.double() - want).norm()
        assert error <= bound, f"output {index} is {error:.3g} off, allowed are {bound:.3g}"


@pytest.fixture
def interpreted(kernels: str) -> bool:
    """Whether the test's `kernels` run in Triton's interpreter, which takes milliseconds for each tile."""
    return is_interpreted(kernels)


@pytest.fixture
def device() -> str:
    """Where the kernels of the test's `kernels` run."""
    return triton_device() if _impl == "triton" else "cpu"


@pytest.fixture
def rows_of() -> Callable[[str, tuple[Any, ...]], tuple[Any, ...]]:
    return few_rows


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
