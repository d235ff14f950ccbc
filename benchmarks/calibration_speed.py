"""How fast this process computes products in bfloat16 and moves bytes, by its own time on the processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from luthier.kernels.linear import linear
from luthier.kernels.linear_cross_entropy import linear_cross_entropy
from luthier.training.recipes.footprint import Speed

_SECONDS = 0.4
_ROWS, _INPUTS, _OUTPUTS = 2048, 256, 768
_MOVED_ELEMENTS = 1 << 24
_WORDS, _SCORED = 2048, 256
_MOVES = 20.0
"""As `training.jobs.fits` has it of a processor."""


def measured_speed() -> Speed:
    """Return the rates, as a layer of the small model has them: 2,048 rows, 256 inputs, 768 outputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_ROWS, _INPUTS, generator=generator).to(torch.bfloat16)
    weight = torch.randn(_OUTPUTS, _INPUTS, generator=generator).to(torch.bfloat16)
    source = torch.zeros(_MOVED_ELEMENTS)
    place = torch.ones(_MOVED_ELEMENTS)
    head = torch.randn(_WORDS, _INPUTS, generator=generator).to(torch.bfloat16).requires_grad_()
    hidden = x[:_SCORED].clone().requires_grad_()
    target = torch.randint(0, _WORDS, (_SCORED,), generator=generator)

    def score() -> None:
        linear_cross_entropy(hidden, head, target).loss_sum.backward()  # type: ignore[no-untyped-call]

    scored = _seconds(score)
    with torch.no_grad():
        product = _seconds(lambda: linear(x, weight))
        copy = _seconds(lambda: place.copy_(source))
    # A copy reads and writes.
    return Speed(
        operations=2.0 * _ROWS * _INPUTS * _OUTPUTS / product,
        trained_head=6.0 * _SCORED * _INPUTS * _WORDS / scored,
        bytes=2.0 * source.element_size() * _MOVED_ELEMENTS / copy,
        moves=_MOVES,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return the processor's seconds of one piece of work, the first one left out."""
    work()
    began, count = time.process_time(), 0
    while time.process_time() - began < _SECONDS:
        work()
        count += 1
    return (time.process_time() - began) / count
