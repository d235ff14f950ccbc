"""Eager reference of `grouped_lora_linear`, in plain torch: any float dtype and device, gradients by autograd."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.kernels.dequantise.reference import frozen_linear
from luthier.kernels.lora_linear.reference import dropped, lora_linear_reference

if TYPE_CHECKING:
    from luthier.kernels.grouped_lora_linear import LoraAdapter, Segment


def grouped_lora_linear_reference(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    adapters: Sequence["LoraAdapter"],
    segments: Sequence["Segment"],
) -> Tensor:
    """Each segment by itself, one after the other."""
    outputs = []
    parts = torch.split(x_MK, [one.num_rows for one in segments])
    for rows, segment in zip(parts, segments, strict=True):
        if segment.adapter < 0:
            outputs.append(frozen_linear(rows, weight_NK, bias_N))
            continue
        one = adapters[segment.adapter]
        kept = dropped(rows, one.dropout, (segment.seed, segment.stream, segment.row0))
        outputs.append(lora_linear_reference(rows, kept, weight_NK, bias_N, (one.a, one.b, one.scale)))
    return torch.cat(outputs) if outputs else frozen_linear(x_MK, weight_NK, bias_N)
