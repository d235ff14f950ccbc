"""Where Triton's kernels run in these tests, on a machine with a GPU and on one without."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode


@pytest.fixture
def shared(request: pytest.FixtureRequest) -> Any:
    """The module that the operators' tests share."""
    return request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py")))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("has_gpu", "interprets", "device", "marks"),
    [
        (True, False, "cuda", ["gpu"]),
        (True, True, "cpu", []),
        (False, True, "cpu", []),
    ],
)
def test_triton_is_marked_gpu_where_it_runs_on_one(
    has_gpu: bool,
    interprets: bool,
    device: str,
    marks: list[str],
    shared: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interprets else "")
    assert shared.triton_device() == device
    (parameter,) = shared.triton_parameters()
    assert parameter.values == ("triton",)
    assert [mark.name for mark in parameter.marks] == marks


def test_kernels_get_their_inputs_on_the_device(shared: Any) -> None:
    seen: list[Tensor] = []

    def run(impl: str, *given: Tensor) -> list[Tensor]:
        seen.extend(given)
        raise StopIteration

    inputs = [torch.randn(3, 2).requires_grad_(), torch.randn(2), torch.tensor([1, 2])]
    with pytest.raises(StopIteration):
        shared.with_gradients(run, "triton", inputs, torch.bfloat16, "meta")
    assert {one.device.type for one in seen} == {"meta"}
    assert [one.dtype for one in seen] == [torch.bfloat16, torch.bfloat16, torch.int64]
    assert [one.requires_grad for one in seen] == [True, False, False]


class Recorded:
    """Stands for a Triton kernel: knows which launches Triton itself made, and which a compiled kernel."""

    arg_names = ("x", "count", "WIDE", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        kernel = self

        class Compiled:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *arguments: kernel.launched.append((grid, *arguments))

        def first(*arguments: Any, **constants: Any) -> Compiled:
            self.compiled.append((grid, *arguments, constants))
            return Compiled()

        return first


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    gpu = pytest.importorskip("luthier.kernels.gpu")
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "_compiled", {})
    return Recorded()


def test_a_kernel_is_launched_as_it_was_compiled(kernel: Recorded) -> None:
    from luthier.kernels.gpu import Launch, enqueue

    launch, x = Launch(tiles={"BLOCK": 32}), torch.zeros(64)
    for count in (48, 64, 160):
        enqueue(kernel, (count,), (x, count), {"WIDE": True}, launch)
    ((grid, *operands, constants),) = kernel.compiled
    assert (grid, operands[1]) == ((48,), 48)
    assert constants == {"WIDE": True, **launch.options}
    # What follows gets the constants in the kernel's order, and a grid of three dimensions.
    assert [(one[0], *one[2:]) for one in kernel.launched] == [
        ((64, 1, 1), 64, True, 32),
        ((160, 1, 1), 160, True, 32),
    ]


def test_a_kernel_is_compiled_anew_for_what_it_may_not_be_launched_on(kernel: Recorded) -> None:
    from luthier.kernels.gpu import Launch, enqueue

    launches, x = [Launch(tiles={"BLOCK": size}) for size in (32, 64)], torch.zeros(64)
    kinds = [
        ((x, 48), True, launches[0]),
        ((x[1:], 48), True, launches[0]),  # its address is no multiple of 16
        ((x.half(), 48), True, launches[0]),
        ((x, 1), True, launches[0]),
        ((x, 49), True, launches[0]),
        ((x, 2**33), True, launches[0]),
        ((x, 2**63), True, launches[0]),
        ((x, 1.0), True, launches[0]),
        ((x.bfloat16(), 48), True, launches[0]),
        ((x, 48), False, launches[0]),
        ((x, 48), True, launches[1]),
    ]
    for _ in range(2):
        for operands, wide, launch in kinds:
            enqueue(kernel, (1,), operands, {"WIDE": wide}, launch)
    assert len(kernel.compiled) == len(kernel.launched) == len(kinds)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(
    kernel: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.kernels import gpu

    current = [0]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current[0], before = device.index, current[0]
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(gpu, "_kind", lambda operand: current[0])
    with FakeTensorMode():
        tensors = [torch.empty(4, device=f"cuda:{index}") for index in (1, 0, 1, 0)]
    launch = gpu.Launch(tiles={"BLOCK": 32})
    for x in tensors:
        gpu.enqueue(kernel, (1,), (x, 48), {"WIDE": True}, launch)
    assert current == [0]
    assert len(kernel.compiled) == len(kernel.launched) == 2


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_amds_kernels_for_tensors_of_32_bits_take_no_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.kernels.gpu import _kind

    short, long = (torch.empty(size, dtype=torch.int8) for size in (2**20, 2**31))
    assert _kind(short) == _kind(long)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _kind(short) != _kind(long)
    assert _kind(long[:16]) == _kind(long)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_descriptors_of_other_tiles_or_types_take_another_kernel() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from luthier.kernels.gpu import _kind

    x = torch.zeros(16, 16)
    made = [TensorDescriptor.from_tensor(one, tile) for one in (x, x.half()) for tile in ([8, 8], [8, 16])]
    assert len({_kind(one) for one in made}) == 4
    assert _kind(TensorDescriptor.from_tensor(x.clone(), [8, 8])) == _kind(made[0])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_numbers_of_one_kind_are_one_to_triton() -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import BaseBackend

    from luthier.kernels.gpu import _kind

    edges = [
        0,
        1,
        2,
        8,
        16,
        17,
        2**15,
        2**31 - 16,
        2**31 - 1,
        2**31,
        2**32,
        2**62,
        2**63 - 16,
        2**63 - 1,
        2**63,
    ]
    numbers = [*edges, *(-one for one in edges[:-1]), 2**64 - 1, 2**64 - 16]
    for one in numbers:
        for other in numbers:
            if _kind(one) == _kind(other):
                known = [
                    native_specialize_impl(BaseBackend, value, False, True, True) for value in (one, other)
                ]
                assert known[0] == known[1], (one, other)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_the_library_are_float32(dtype: torch.dtype) -> None:
    from luthier.kernels.gpu import product_float32

    left, right = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    found = product_float32(left, right)
    assert found.dtype == torch.float32
    assert torch.allclose(found, left.float() @ right.float(), atol=1e-2)
