"""The spy finds what would fail on a GPU, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.device_spy import DeviceSpy
from torch import nn

CPU = torch.device("cpu")


def test_tensors_of_two_places_are_found() -> None:
    with DeviceSpy() as spy:
        there = torch.ones(3).to(CPU)
        there + torch.ones(3)
    assert list(spy.found) == ["a test: torch.Tensor.add of 1 tensors on the device and one (3,) that is not"]


@pytest.mark.parametrize(
    "makes",
    [
        torch.zeros,
        torch.ones,
        torch.arange,
        lambda n: torch.tensor([0] * n),
        lambda n: torch.from_numpy(np.zeros(n)),
    ],
)
def test_a_tensor_that_is_made_without_a_device_is_found(makes: object) -> None:
    with DeviceSpy() as spy:
        there = torch.ones(3, device=CPU)
        torch.stack([there, makes(3).float()])  # type: ignore[operator]
    assert len(spy.found) == 1


def test_what_is_taken_as_an_array_is_found() -> None:
    with DeviceSpy() as spy:
        there = torch.ones(3, device=CPU)
        there.cpu().numpy()
        assert not spy.found
        there.numpy()
    assert len(spy.found) == 1


def test_what_goes_to_the_device_in_time_is_right() -> None:
    layer = nn.Linear(3, 2)
    with DeviceSpy() as spy:
        layer.to(CPU)
        x = torch.from_numpy(np.ones((4, 3), dtype=np.float32)).to(CPU)
        loss = layer(x)[torch.tensor([1, 2], device=x.device)].sum() * 2.0
        loss.backward()
        optimiser = torch.optim.AdamW(layer.parameters(), foreach=False)
        optimiser.step()
        layer.weight.detach().copy_(torch.zeros(2, 3))
        assert torch.isfinite(loss.cpu()).item()
    assert not spy.found
    assert spy.num_on_device > 10


def test_from_numpy_is_torchs_own_again_behind_the_block() -> None:
    before = torch.from_numpy
    with DeviceSpy():
        assert torch.from_numpy is not before
    assert torch.from_numpy is before
