"""What the layers of one pass share on a device: the boundaries of its sequences, made once.

Shape suffixes: N sequences.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_P = ParamSpec("_P")
_R = TypeVar("_R")


def kept(make: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator for what is made of hashable arguments on a device: the last two results are kept and given again.

    Two, as some models' layers take turns with a sliding window and without.
    """
    cached = functools.lru_cache(maxsize=2)(make)

    @functools.wraps(make)
    def get(*arguments: _P.args, **named: _P.kwargs) -> _R:
        # A mode's tensors (fake, traced) are no good once it has ended.
        if is_in_torch_dispatch_mode():
            return make(*arguments, **named)
        # Tensors born in inference mode could not be saved for a backward pass that comes later.
        with torch.inference_mode(False):
            return cached(*arguments, **named)  # type: ignore[arg-type] # hashable: no type says it

    return get


def distinct(cu_seqlens: Sequence[int]) -> tuple[int, ...]:
    """The boundaries without those of empty sequences."""
    return tuple(dict.fromkeys(cu_seqlens))


def longest_of(bounds: Sequence[int]) -> int:
    """Tokens of the longest sequence, 0 of none."""
    return max((end - start for start, end in pairwise(bounds)), default=0)


@kept
def bounds_on(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """The boundaries as an int32 tensor [N + 1] on the device."""
    return torch.tensor(bounds, dtype=torch.int32, device=device)
