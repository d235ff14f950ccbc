"""`attention_varlen` on a GPU by the libraries that are there: which one takes which inputs, and the calls.

The order is that of a measurement (H100, bfloat16, forward and backward, 32 heads over 8 key heads of 128, in ms;
FlexAttention with its mask at hand):

    tokens                      torch varlen   FlexAttention   SDPA, dense mask   eager
    4,096 in 10 sequences               1.22            1.63               3.52    2.43
    8 sequences of 1,024                1.93            2.20              12.77    2.72

SDPA with a block-diagonal mask has no place here: wherever it can run, so can eager, which calls SDPA for each
sequence, was faster each time and makes no T x T mask. The package flash-attn comes first because who installs it
wants it, and because it has newer kernels, with capped scores.

Shape suffixes: T tokens, H query heads, G key/value heads, D head size.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.kernels.attention_varlen.bounds import bounds_on, distinct, longest_of
from luthier.kernels.attention_varlen.flex import attend_flex
from luthier.kernels.attention_varlen.reference import attention_varlen_reference
from luthier.kernels.operands import heads_of
from luthier.kernels.tables import forced

DTYPES = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], float, float, int], Tensor]
"""(query_THD, key_TGD, value_TGD, cu_seqlens, scale, softcap, window) -> [T, H, D], for at least one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What settles which backends can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    softcap: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A way to compute attention.

    Attributes:
        name: as it stands in a run's record.
        refuse: why it cannot take these inputs, or None.
        attend: the computation.
    """

    name: str
    refuse: Callable[[Inputs], str | None]
    attend: Attend


def attend(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Attention output [T, H, D] of at least one token, by the first backend that can run."""
    inputs = Inputs(
        device=query_THD.device, dtype=query_THD.dtype, head_dim=query_THD.shape[2], softcap=softcap
    )
    return backend_for(inputs).attend(query_THD, key_TGD, value_TGD, cu_seqlens, scale, softcap, window)


def backend_for(inputs: Inputs, name: str | None = None) -> Backend:
    """The backend of that name, else the first of `BACKENDS` that can run; eager where `force_impl` says so.

    Raises:
        ValueError: there is no such backend, or it cannot take these inputs; the message says why.
    """
    if name is None:
        name = "eager" if forced() == "eager" else None
    candidates = [backend for backend in BACKENDS if name in (None, backend.name)]
    if not candidates:
        raise ValueError(f"backend must be one of {[backend.name for backend in BACKENDS]}, got {name!r}")
    reasons: list[str] = []
    for backend in candidates:
        reason = backend.refuse(inputs)
        if reason is None:
            if reasons and backend is BACKENDS[-1]:
                _say_once("; ".join(reasons))
            return backend
        reasons.append(f"{backend.name} {reason}")
    raise ValueError("; ".join(reasons))


@functools.cache
def _say_once(reasons: str) -> None:
    _log.warning("attention_varlen runs eager, sequence by sequence: %s", reasons)


@functools.cache
def flash_attn_function() -> Callable[..., Tensor] | str:
    """`flash_attn.flash_attn_varlen_func`, or why it is not to be had; looked for once in a process."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return "is not installed"
        return f"cannot be imported: {error}"
    function: Callable[..., Tensor] | None = getattr(package, "flash_attn_varlen_func", None)
    if function is None or "softcap" not in inspect.signature(function).parameters:
        return f"must be 2.6 or a later 2.x, got {getattr(package, '__version__', 'no version')}"
    return function


@functools.cache
def has_torch_flash() -> bool:
    """Tell whether torch was built with the kernels of its `varlen_attn`."""
    return torch.backends.cuda.is_flash_attention_available()


@functools.cache
def has_triton() -> bool:
    """Tell whether torch can compile FlexAttention."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(device)


def _refuse_here(inputs: Inputs) -> str | None:
    """Why none of the libraries can take the inputs: their device or type."""
    if inputs.device.type != "cuda":
        return f"needs tensors on a GPU, got {inputs.device}"
    if torch.version.hip is not None:
        return "is taken on CUDA alone, got ROCm, where it is untried"
    if inputs.dtype not in DTYPES:
        return f"needs bfloat16 or float16, got {inputs.dtype}"
    if capability(inputs.device) < (8, 0):
        return f"needs compute capability 8.0, got {'.'.join(map(str, capability(inputs.device)))}"
    return None


def _refuse_flash(inputs: Inputs) -> str | None:
    """Why kernels of flash-attention, whoever built them, cannot take the inputs."""
    if reason := _refuse_here(inputs):
        return reason
    if inputs.head_dim % 8 != 0 or inputs.head_dim > 256:
        return f"needs heads of a multiple of 8, at most 256, got {inputs.head_dim}"
    return None


def _refuse_flash_attn(inputs: Inputs) -> str | None:
    if reason := _refuse_flash(inputs):
        return reason
    function = flash_attn_function()
    return function if isinstance(function, str) else None


def _refuse_torch_varlen(inputs: Inputs) -> str | None:
    if reason := _refuse_flash(inputs):
        return reason
    if inputs.softcap:
        return f"has no capped scores, got softcap {inputs.softcap}"
    return None if has_torch_flash() else "is not in this build of torch"


def _refuse_flex(inputs: Inputs) -> str | None:
    if reason := _refuse_here(inputs):
        return reason
    if inputs.head_dim < 16:
        return f"needs heads of at least 16, got {inputs.head_dim}"
    return None if has_triton() else "needs the package triton, which is not installed"


def _attend_flash_attn(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    function = flash_attn_function()
    assert not isinstance(function, str)
    kept = distinct(cu_seqlens)
    bounds, longest = bounds_on(kept, query_THD.device), longest_of(kept)
    return function(
        heads_of(query_THD),
        heads_of(key_TGD),
        heads_of(value_TGD),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _attend_torch_varlen(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert softcap == 0
    kept = distinct(cu_seqlens)
    bounds, longest = bounds_on(kept, query_THD.device), longest_of(kept)
    output = varlen_attn(
        heads_of(query_THD),
        heads_of(key_TGD),
        heads_of(value_TGD),
        cu_seq_q=bounds,
        cu_seq_k=bounds,
        max_q=longest,
        max_k=longest,
        scale=scale,
        window_size=_window_size(window),
        enable_gqa=True,
    )
    assert isinstance(output, Tensor)
    return output


def _window_size(window: int) -> tuple[int, int]:
    """Keys to the left and to the right of a query's own that it sees; -1: all."""
    return (window - 1, 0)


BACKENDS = (
    Backend(name="flash-attn", refuse=_refuse_flash_attn, attend=_attend_flash_attn),
    Backend(name="torch varlen", refuse=_refuse_torch_varlen, attend=_attend_torch_varlen),
    Backend(name="FlexAttention", refuse=_refuse_flex, attend=attend_flex),
    Backend(name="eager", refuse=lambda _: None, attend=attention_varlen_reference),
)
"""In the order in which they are taken."""
