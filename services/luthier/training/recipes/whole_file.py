"""A safetensors file that is written tensor by tensor, so that no more than one of them has to be in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_whole(
    path: Path,
    forms: Mapping[str, tuple[Sequence[int], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write tensors, in main memory, that come in the order of `forms`, their shapes and types.

    The bytes are those that `safetensors` writes of tensors that come by the size of their elements, the largest first,
    and then by name. What the format is: https://github.com/huggingface/safetensors, section Format.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in forms.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    names = list(forms)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for place, (name, tensor) in enumerate(tensors):
            assert name == names[place], "tensors come in the order of their forms"
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
