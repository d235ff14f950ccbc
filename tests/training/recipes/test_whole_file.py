"""A file that is written tensor by tensor has the bytes that safetensors writes of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from luthier.training.recipes.whole_file import write_whole

TENSORS = {
    "b": torch.arange(6, dtype=torch.int64).view(2, 3),
    "a": torch.arange(5.0),
    "head": torch.arange(12.0).view(3, 4).bfloat16(),
    "ids": torch.tensor([True, False, True]),
}
"""The widest first."""


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    forms = {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}
    write_whole(tmp_path / "ours", forms, iter(TENSORS.items()))
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_in_another_order_are_a_mistake(tmp_path: Path) -> None:
    forms = {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}
    with pytest.raises(AssertionError, match="in the order of their forms"):
        write_whole(tmp_path / "ours", forms, reversed(list(TENSORS.items())))
