"""The kernels of Liger and cut-cross-entropy as their own host code launches them, each beside the case of ours.

A peer's host code runs on tensors in main memory while torch says that a chip is there. The launch that it makes is
kept instead of being run, so tiles, warps and constants are the peer's own choice. Numbers are specialised as the
runtime would: 1 is a constant, a multiple of 16 is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from triton_static import TARGETS, gpu_target
from triton_static_cases import Case

from luthier.kernels.gpu import Launch

LIGER = "liger-kernel"
CUT = "cut-cross-entropy"
# No multiple of 16, as a batch holds any number of rows.
_ROWS = 8200
_VOCAB, _HIDDEN = 128256, 4096
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint32: "*u32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A kernel of a peer beside the case of ours that stands for the same work.

    Attributes:
        ours: name of the case.
        peer: name of its distribution.
        problem: what both solve.
        run: host code of the peer that launches the kernel.
        number: which of its launches that is.
        is_matmul: whether the kernel must hold matrix instructions.
    """

    ours: str
    peer: str
    problem: str
    run: Callable[[], object]
    number: int = 0
    is_matmul: bool = False


def comparisons() -> Iterator[Comparison]:
    """Every kernel of a peer that is compared; none of them is imported yet."""
    yield from _norms()
    yield from _ropes()
    yield from _gated()
    yield from _losses()


def _passes(ours: Sequence[str], peer: str, problem: str, run: Callable[[], object]) -> Iterator[Comparison]:
    """A forward and a backward pass of one kernel each."""
    for number, name in enumerate(("forward", "backward")):
        yield Comparison(ours=ours[number], peer=peer, problem=f"{problem}, {name}", run=run, number=number)


def _norms() -> Iterator[Comparison]:
    for dim in (576, 4096, 16384):
        ours = [f"rms_norm: {name} of {dim}, bf16" for name in ("forward", "backward")]
        yield from _passes(ours, LIGER, f"rms_norm of {dim}", partial(_norm, dim))


def _norm(dim: int) -> None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = _learnt(_ROWS, dim), _empty(dim)
    _back(LigerRMSNormFunction.apply(x, weight, 1e-5), x)


def _ropes() -> Iterator[Comparison]:
    for heads, key_heads, head_dim, rotary in ((9, 3, 64, 64), (32, 8, 128, 128), (24, 8, 96, 72)):
        prefix = f"rope: {heads} heads of {head_dim}, {rotary} turned"
        ours = [f"{prefix}, {transposed=}, bf16" for transposed in (False, True)]
        problem = f"rope of {heads} and {key_heads} heads of {head_dim}, {rotary} turned"
        yield from _passes(ours, LIGER, problem, partial(_rope, heads, key_heads, head_dim, rotary))


def _rope(heads: int, key_heads: int, head_dim: int, rotary: int) -> None:
    from liger_kernel.ops.rope import LigerRopeFunction

    # Transposed views of contiguous rows, as projections give them.
    rows = [_learnt(1, _ROWS, count, head_dim) for count in (heads, key_heads)]
    angles = _empty(1, _ROWS, rotary)
    turned = LigerRopeFunction.apply(*(one.transpose(1, 2) for one in rows), angles, angles)
    grads = [torch.empty_like(one.transpose(1, 2)).transpose(1, 2) for one in turned]
    torch.autograd.grad(turned, rows, grads)


def _gated() -> Iterator[Comparison]:
    for activation in ("silu", "gelu"):
        for size in (1536, 14336):
            ours = [f"gated_activation: {name}, {activation}, bf16" for name in ("forward", "backward")]
            problem = f"{activation} of {size}"
            yield from _passes(ours, LIGER, problem, partial(_activation, activation, size))


def _activation(activation: str, size: int) -> None:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"silu": LigerSiLUMulFunction, "gelu": LigerGELUMulFunction}[activation]
    gate, up = _learnt(_ROWS, size), _learnt(_ROWS, size)
    _back(function.apply(gate, up), gate, up)


def _losses() -> Iterator[Comparison]:
    problem = f"loss of {_VOCAB} words"
    ours = "linear_cross_entropy: rows, loss and gradient, bf16"
    yield Comparison(ours=ours, peer=LIGER, problem=f"{problem}, rows", run=_liger_loss)
    kernels = {
        "log-sum-exp": (_cut_log_sum_exp, True),
        "labels": (_cut_labels, False),
        "backward": (_cut_backward, True),
    }
    for name, (run, is_matmul) in kernels.items():
        yield Comparison(
            ours=ours,
            peer=CUT,
            problem=f"{problem} from {_HIDDEN}, {name}",
            run=run,
            is_matmul=is_matmul,
        )


def _liger_loss() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # The head's product is really computed, and the kernel does not depend on these sizes.
    hidden, weight = _learnt(8, 64), _empty(_VOCAB, 64)
    # bias, class weights, ignored label, z-loss, smoothing, reduction
    options = (None, None, -100, 0.0, 0.0, "sum")
    LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, _words(8), *options)


def _cut_log_sum_exp() -> None:
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    # With mean logits, by which its default orders the words for the backward pass.
    cce_lse_forward_kernel(_empty(_ROWS, _HIDDEN), _empty(_VOCAB, _HIDDEN), return_logit_avg=True)


def _cut_labels() -> None:
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel

    hidden, weight = _empty(_ROWS, _HIDDEN), _empty(_VOCAB, _HIDDEN)
    indexed_neg_dot_forward_kernel(hidden, weight, _words(_ROWS), out_dtype=torch.float32)


def _cut_backward() -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel

    # The head is frozen, as ours is; gradients below its default threshold are left out.
    cce_backward_kernel(
        torch.ones(()),
        _empty(_ROWS, _HIDDEN),
        _empty(_VOCAB, _HIDDEN),
        torch.empty(_ROWS),
        valids=None,
        softcap=None,
        filter_eps=torch.finfo(torch.bfloat16).eps / 32,
        targets=_words(_ROWS),
        vocab_ordering=torch.zeros(_VOCAB, dtype=torch.int32),
    )


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _learnt(*shape: int) -> Tensor:
    return _empty(*shape).requires_grad_()


def _words(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


def _back(output: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def peer_case(comparison: Comparison, target: str) -> Case:
    """The peer's kernel as its host code would launch it on a target."""
    with _chip(target):
        kernel, arguments = launches(comparison.run)[comparison.number]
    return case_of(comparison, target, kernel, arguments)


@contextmanager
def _chip(target: str) -> Iterator[None]:
    """Let torch, and what Liger keeps of its answers, say that the chip is there."""
    from liger_kernel.utils import infer_device_arch

    chip = TARGETS[target]
    version = divmod(int(chip.arch), 10) if chip.backend == "cuda" else (9, 4)
    said = {
        "is_available": True,
        "get_device_capability": version,
        "get_device_properties": SimpleNamespace(gcnArchName=target),
    }
    hip = "6.4" if chip.backend == "hip" else None
    replaced: dict[str, Any] = {name: Mock(return_value=answer) for name, answer in said.items()}
    infer_device_arch.cache_clear()
    with patch.multiple(torch.cuda, **replaced), patch.object(torch.version, "hip", hip):
        yield


def launches(run: Callable[[], object]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that host code launches, each with its arguments and options by name; none of them runs."""
    from triton.runtime.jit import JITFunction

    found = []

    def keep(kernel: Any, *values: Any, **named: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, values, strict=False)), **named}))

    with patch.object(JITFunction, "run", keep):
        run()
    return found


def case_of(comparison: Comparison, target: str, kernel: Any, arguments: Mapping[str, Any]) -> Case:
    """A launch as a case: what the runtime would make constant, and which numbers it would take as aligned."""
    from triton.compiler import make_backend

    types, constants, aligned = {}, {}, set()
    for parameter in kernel.params:
        name = parameter.name
        value = arguments.get(name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
            continue
        types[name] = _type(value)
        if isinstance(value, int) and value % 16 == 0:
            aligned.add(name)
    # Fusing of multiply and add is set, as its default changes between versions of Triton.
    defaults = make_backend(gpu_target(target)).parse_options({"enable_fp_fusion": True})
    options = {name: arguments.get(name, getattr(defaults, name)) for name in ("num_warps", "num_stages")}
    return Case(
        op=comparison.peer,
        name=comparison.problem,
        kernel=kernel,
        launches={"*": Launch(**options)},
        types=types,
        aligned=frozenset(aligned),
        constants=constants,
        is_matmul=comparison.is_matmul,
    )


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return {float: "fp32", int: "i32"}[type(value)]
