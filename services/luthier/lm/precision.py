"""What the weights of a base model's linear layers are held in, and the bytes that takes. Imports no torch."""

import math
from typing import Literal, get_args

Precision = Literal["BFLOAT16", "INT8", "NF4"]
"""As registered; 8 bits with a scale for each output; 4 bits in blocks whose scales have 8 bits (arXiv:2305.14314)."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NF4_BLOCK = 64
"""Weights of a block, which share a scale."""
_MOST_SCALES = 256
_INT8_ROW_BYTES = 5
_NF4_LEVELS_BYTES = 34


def scales_together(num_blocks: int) -> int:
    """Return how many scales of blocks share a factor: 256, or the largest power of two that divides their number."""
    return math.gcd(_MOST_SCALES, num_blocks)


def weight_bytes(precision: Precision, outputs: int, inputs: int) -> int:
    """Return the bytes of a linear layer's weight, scales and all."""
    count = outputs * inputs
    match precision:
        case "BFLOAT16":
            return 2 * count
        case "INT8":
            return count + _INT8_ROW_BYTES * outputs
        case "NF4":
            blocks = count // NF4_BLOCK
            return count // 2 + blocks + 2 * (blocks // scales_together(blocks)) + _NF4_LEVELS_BYTES
