"""Float32 masters beside what a model computes with, their gradients, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.errors import DataLoss

_PIECE_ELEMENTS = 1 << 18


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor's rows, some in each view: what is made of them stays in a processor's second cache.

    On a GPU, where a call costs more than what it saves, the tensor itself.
    """
    if tensor.device.type != "cpu":
        return [tensor]
    return torch.split(tensor, max(1, _PIECE_ELEMENTS // max(1, math.prod(tensor.shape[1:]))))


def mastered(weight: nn.Parameter) -> nn.Parameter:
    """Return a float32 copy of a weight, in whose gradient all gradients of the weight are summed."""
    master = nn.Parameter(weight.detach().float())

    def move(of_weight: Tensor) -> None:
        assert master.grad is not None
        assert of_weight.grad is not None
        # A sum of two types takes five times as long as widening some of it and adding that.
        for sums, added in zip(pieces(master.grad), pieces(of_weight.grad), strict=True):
            sums.add_(added.float())
        of_weight.grad = None

    weight.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
    return master


def round_into(masters: Mapping[str, nn.Parameter], weights: Mapping[str, nn.Parameter]) -> None:
    """Round each master that is not the weight itself into the weight of its name."""
    for name, master in masters.items():
        if master is not weights[name]:
            weights[name].copy_(master)


def with_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give each a gradient of zero: also one that a batch does not pass through (an expert) is part of every step."""
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}"
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in main memory, as files hold them."""
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors, that have the names, shapes and types expected. Raises DataLoss."""
    try:
        found = load_file(path)
    # What safetensors raises is a class of its own for some files, and the system's for others.
    except Exception as error:
        raise DataLoss(f"{path.name} cannot be read: {error}") from error

    def form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    if form(found) != form(expected):
        differing = sorted(form(found).items() ^ form(expected).items(), key=str)[:1]
        raise DataLoss(
            f"{path.name} must hold the tensors of this run's weights, got other ones: {differing}"
        )
    return found


def put(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of their names."""
    for name, tensor in into.items():
        tensor.copy_(tensors[name])
