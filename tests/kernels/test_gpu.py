"""Where Triton's kernels run in these tests, on a machine with a GPU and on one without."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


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
