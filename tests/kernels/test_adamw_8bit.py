"""AdamW with moments of 8 bits: torchao's own update and codes, the same bits with any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.adamw_8bit import BLOCK, Rates, adamw_8bit, fresh_moments
from luthier.kernels.dispatch import Isa
from luthier.kernels.tables import Impl

RATES = Rates(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8, number=1)


def updated(
    impl: Impl, *shape: int, steps: int = 4, spread: float = 3.0
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A weight and its moments after some updates by gradients whose sizes differ from row to row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(*shape, generator=generator)
    moments = fresh_moments(weight)
    sizes = 10 ** -(torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) * spread)
    for number in range(1, steps + 1):
        grad = torch.randn(*shape, generator=generator) * sizes
        adamw_8bit(weight, grad, moments, replace(RATES, number=number), impl=impl)
    return weight, moments


def parts(moments: tuple[Any, Any]) -> list[Tensor]:
    return [part for moment in moments for part in (moment.codes, moment.scale)]


@pytest.mark.parametrize("shape", [(256,), (64, 96), (1024, 300), (2, 3, 512)])
def test_cpu_makes_what_torchao_makes(isa: Isa, shape: tuple[int, ...]) -> None:
    weight, moments = updated("cpu", *shape)
    wanted, others = updated("eager", *shape)
    apart = (weight - wanted).abs()
    assert apart.max() < 0.1 * RATES.learning_rate, "where a code differs"
    assert (apart > 1e-5).float().mean() < 1e-3
    for found, other in zip(parts(moments), parts(others), strict=True):
        if found.dtype == torch.uint8:
            # Where the last bit of a moment decides between two codes.
            distance = (found.int() - other.int()).abs()
            assert distance.max() <= 1
            assert (distance > 0).float().mean() < 1e-3
        else:
            assert torch.allclose(found, other, rtol=1e-4)


def test_cpu_bits_do_not_depend_on_threads(isa: Isa, same_for_threads: Callable[..., None]) -> None:
    def compute() -> list[Tensor]:
        weight, moments = updated("cpu", 300, 512)
        return [weight, *parts(moments)]

    same_for_threads(compute)


@pytest.mark.parametrize("impl", ["cpu", "eager"])
def test_updates_stay_near_those_of_float32(impl: Impl) -> None:
    weight, _ = updated(impl, 64, 512, steps=10, spread=1.0)
    generator = torch.Generator().manual_seed(3)
    plain = torch.nn.Parameter(torch.randn(64, 512, generator=generator))
    before = plain.detach().clone()
    sizes = 10 ** -torch.rand(64, 1, generator=generator)
    optimiser = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        plain.grad = torch.randn(64, 512, generator=generator) * sizes
        optimiser.step()
    moved = (plain.detach() - before).norm()
    assert (weight - plain.detach()).norm() < 0.1 * moved


def test_moments_that_are_zero_stay_numbers(isa: Isa) -> None:
    weight = torch.ones(2, BLOCK)
    moments = fresh_moments(weight)
    adamw_8bit(weight, torch.zeros(2, BLOCK), moments, RATES, impl="cpu")
    assert torch.allclose(weight, torch.tensor(1 - 1e-3))
    assert all(bool(part.isfinite().all()) for part in parts(moments))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="moments of 8 bits need a multiple of 256 weights, got 255"):
        fresh_moments(torch.zeros(255))
    weight = torch.zeros(2, BLOCK)
    moments = fresh_moments(weight)
    with pytest.raises(ValueError, match="must be dense float32 of one shape"):
        adamw_8bit(weight, torch.zeros(BLOCK, 2).T, moments, RATES)
    with pytest.raises(ValueError, match="must be dense float32 of one shape"):
        adamw_8bit(weight.bfloat16(), weight.bfloat16(), moments, RATES)
    with pytest.raises(ValueError, match="impl 'triton' is not there for adamw_8bit"):
        adamw_8bit(weight, weight.clone(), moments, RATES, impl="triton")
