"""The linear layers of a frozen base model in 8 or 4 bits, as torchao's tensors.

Embedding and head stay as they are: they are read by rows and by the loss, and an adapter may train them. The same
weights give the same bytes in every process and with any number of threads, so that a resumed run computes with the
very weights that it began with.

Shape suffixes: N outputs, K inputs, B blocks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.errors import InvalidArgument, Reason
from luthier.kernels.dequantise import dequantise, is_quantised
from luthier.lm.head import output_head
from luthier.lm.memory import FilePages, give_back
from luthier.lm.precision import NF4_BLOCK, Precision, scales_together

_PIECE_ELEMENTS = 1 << 18
_HALF = 128
_ZERO_CODE = 7
"""Of NF4's sixteen levels the one that is 0."""


def quantise_linears(model: PreTrainedModel, precision: Precision, device: torch.device | str) -> None:
    """Hold every linear layer but the head so from now on, on a device; layer after layer.

    What was mapped of a file is given back as soon as it is read: at no time are all weights in memory.

    Raises:
        InvalidArgument: a layer cannot be held so (reason MODEL_INVALID).
    """
    if precision == "BFLOAT16":
        return
    pages = FilePages()
    for name, module in _linears(model):
        before = module.weight.detach()
        held = _held(name, before.to(device), precision)
        module.weight = nn.Parameter(held, requires_grad=False)
        pages.give_back(before)
        # Each is made by way of larger pieces: glibc would keep their memory, as much again as the weights take.
        give_back(before.device)


@torch.no_grad()
def round_linears(model: PreTrainedModel, precision: Precision) -> None:
    """Give the linear layers of a float32 model the numbers that `quantise_linears` would hold of them.

    Raises as that does.
    """
    if precision == "BFLOAT16":
        return
    for name, module in _linears(model):
        held = _held(name, module.weight.detach().to(torch.bfloat16), precision)
        module.weight.copy_(dequantise(held))


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    head = output_head(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _held(name: str, weight_NK: Tensor, precision: Precision) -> Tensor:
    try:
        return quantised(weight_NK, precision)
    except ValueError as error:
        raise InvalidArgument(
            f"{name} of this model cannot be held in {precision}: {error}", reason=Reason.MODEL_INVALID
        ) from error


@torch.no_grad()
def quantised(weight_NK: Tensor, precision: Precision) -> Tensor:
    """Return a weight in 8 or 4 bits, as torchao does it; in BFLOAT16 the weight itself.

    Raises:
        ValueError: NF4, and its size is no multiple of 64.
    """
    match precision:
        case "INT8":
            return _int8(weight_NK)
        case "NF4":
            return _nf4(weight_NK)
        case "BFLOAT16":
            return weight_NK


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, of a quantised one all its parts."""
    if not is_quantised(tensor):
        return tensor.numel() * tensor.element_size()
    held: Any = tensor
    parts = [getattr(held, name, None) for name in held.__tensor_flatten__()[0]]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _int8(weight_NK: Tensor) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    # Rows are independent of each other: in pieces, as each is widened on the way.
    rows = max(1, _PIECE_ELEMENTS // max(1, weight_NK.shape[1]))
    pieces = [Int8Tensor.from_hp(piece, PerRow()) for piece in torch.split(weight_NK, rows)]
    found: Tensor = Int8Tensor(
        torch.cat([piece.qdata for piece in pieces]),
        torch.cat([piece.scale for piece in pieces]),
        pieces[0].block_size,
        weight_NK.dtype,
        zero_point=torch.cat([piece.zero_point for piece in pieces]),
    )
    return found


def _nf4(weight_NK: Tensor) -> Tensor:
    """As torchao's `to_nf4`, but for blocks of zeros, which stay zeros.

    There are only 65,536 numbers in bfloat16: torchao says once which code is the nearest to each, and is not asked for
    the distances of each weight to all levels.
    """
    from torchao.quantization import NF4Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    if weight_NK.dtype != torch.bfloat16:
        raise ValueError(f"a weight must be bfloat16 to be made NF4, got {weight_NK.dtype}")
    if weight_NK.numel() % NF4_BLOCK:
        raise ValueError(
            f"NF4 needs a multiple of {NF4_BLOCK} weights, got {weight_NK.numel()} of shape {tuple(weight_NK.shape)}"
        )
    weight_NK = weight_NK.contiguous()
    blocks = weight_NK.view(-1, NF4_BLOCK)
    levels, codes_by_bits = _nearest_codes(weight_NK.device)
    together = scales_together(blocks.shape[0])
    rows = _PIECE_ELEMENTS // NF4_BLOCK
    scales, codes = [], []
    for piece in torch.split(blocks, rows):
        greatest = piece.abs().amax(dim=1)
        bits = (piece / greatest[:, None]).view(torch.uint16).to(torch.int32)
        code = codes_by_bits.index_select(0, bits.flatten())
        scales.append(greatest)
        codes.append(code[::2] << 4 | code[1::2])
    eighths, factors, mean = _quantised_scales(torch.cat(scales), together)
    meta = SubclassTensorArgs(
        *(weight_NK.shape, weight_NK.stride(), 0, weight_NK.dtype, weight_NK.device),
        requires_grad=False,
    )
    sizes = (NF4_BLOCK, blocks.shape[0], together)
    found: Tensor = NF4Tensor(meta, *sizes, eighths, factors, mean, torch.cat(codes), levels)
    return found


@functools.cache
def _nearest_codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return NF4's levels, and the code [65536], uint8, of every number in bfloat16 by its bits; 0 for what is none."""
    from torchao.quantization import NF4Tensor, to_nf4

    levels: Tensor = to_nf4(torch.ones(NF4_BLOCK, dtype=torch.bfloat16), NF4_BLOCK, 1).nf4
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    codes = NF4Tensor.quantize_tensor_nearest(numbers, levels).to(torch.uint8)
    # What 0 / 0 gives: of a block of zeros.
    codes[numbers.isnan()] = _ZERO_CODE
    return levels.to(device), codes.to(device)


def _quantised_scales(scales_B: Tensor, together: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales in 8 bits, the factor of each group of them, and the mean that was taken off, as torchao does.

    The mean is of a sum that is exact, in whatever order: torch's own depends on the number of threads.
    """
    mean = scales_B.double().mean().to(scales_B.dtype)
    groups = (scales_B - mean).view(-1, together)
    greatest = groups.abs().amax(dim=1, keepdim=True)
    factors = 2 * _HALF / (2 * greatest)
    # Scales that are all alike are their mean.
    factors = torch.where(greatest == 0, torch.ones_like(factors), factors)
    eighths = (groups * factors).round().clamp(-_HALF, _HALF - 1)
    return eighths.flatten().to(torch.int8), factors.flatten(), mean
