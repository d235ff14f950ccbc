"""The Triton kernels in the configurations that `triton_static.py` compiles them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.kernels.gated_activation import triton as gated_activation
from luthier.kernels.gpu import Launch, Launches
from luthier.kernels.grouped_lora_linear import triton as grouped
from luthier.kernels.linear_cross_entropy import triton as linear_cross_entropy
from luthier.kernels.lora_linear import triton as lora_linear
from luthier.kernels.rms_norm import triton as rms_norm
from luthier.kernels.rope import triton as rope

_DROPOUT = {"seed": "i64", "stream": "i64", "row0": "i64", "threshold": "i64", "keep_scale": "fp32"}
_RANKS = (16, 64)
# Shrink and gram take the ranks of several projections at once.
_WIDE_RANKS = (*_RANKS, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel with everything fixed that the runtime would fix.

    Attributes:
        types: Triton's type of each argument that is no constant, e.g. *bf16 or i32.
        aligned: integers divisible by 16; pointers always are.
        constants: values of the constants that the launch does not give.
        is_matmul: whether it must hold matrix instructions.
    """

    op: str
    name: str
    kernel: Any
    launches: Launches
    types: Mapping[str, str]
    aligned: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    is_matmul: bool = True


def cases() -> Iterator[Case]:
    """Every kernel in every configuration."""
    for element in ("bf16",):
        yield from _lora_cases(element)
        yield from _grouped_cases(element)
        yield from _norm_cases(element)
        yield from _rope_cases(element)
        yield from _gated_cases(element)
        yield from _loss_cases(element)


def _types(element: str, pointers: str, floats: str, integers: str) -> dict[str, str]:
    """Types of arguments named in three lists of words."""
    return {
        **dict.fromkeys(pointers.split(), f"*{element}"),
        **dict.fromkeys(floats.split(), "*fp32"),
        **dict.fromkeys(integers.split(), "i32"),
    }


def _lora_cases(element: str) -> Iterator[Case]:
    for rank in _RANKS:
        yield from _plain_lora_cases(element, rank)
        for dropout in (False, True):
            yield from _input_gradient_cases(element, rank, dropout)
    for rank in _WIDE_RANKS:
        for dropout in (False, True):
            yield from _dropped_lora_cases(element, rank, dropout)
    yield Case(
        op="lora_linear",
        name=f"lora_linear: sum of slices, {element}",
        kernel=lora_linear.sum_slices_kernel,
        launches={"*": Launch()},
        types={"slices": "*fp32", "out": "*fp32", "count": "i32", "size": "i32", "scale": "fp32"},
        aligned=frozenset({"size"}),
        constants={"BLOCK": 1024},
        is_matmul=False,
    )


def _plain_lora_cases(element: str, rank: int) -> Iterator[Case]:
    constants = {"PRECISION": "tf32", "BLOCK_R": rank}
    yield _lora(
        f"expand, rank {rank}, {element}",
        (lora_linear.expand_kernel, lora_linear.EXPAND),
        _types(element, "x weight bias s b y", "", "x_stride weight_stride s_stride M N K R"),
        {**constants, "HAS_BIAS": True, "GROUP": 8},
    )
    yield _lora(
        f"rank gradients, rank {rank}, {element}",
        (lora_linear.rank_gradients_kernel, lora_linear.RANK_GRADIENTS),
        _types(element, "grad s b ds", "slices", "grad_stride s_stride ds_stride M N R"),
        constants,
    )


def _dropped_lora_cases(element: str, rank: int, dropout: bool) -> Iterator[Case]:
    label = f"rank {rank}{', dropout' if dropout else ''}, {element}"
    constants = {"PRECISION": "tf32", "DROPOUT": dropout}
    yield _lora(
        f"shrink, {label}",
        (lora_linear.shrink_kernel, lora_linear.SHRINK),
        {**_types(element, "x a s", "", "x_stride M K Q"), **_DROPOUT},
        {**constants, "BLOCK_Q": rank},
    )
    yield _lora(
        f"gram, {label}",
        (lora_linear.gram_kernel, lora_linear.GRAM),
        {**_types(element, "low x", "slices", "low_stride x_stride M Q K slice_rows"), **_DROPOUT},
        {**constants, "BLOCK_Q": rank},
    )


def _input_gradient_cases(element: str, rank: int, dropout: bool) -> Iterator[Case]:
    pointers = "grad0 grad1 grad2 weight0 weight1 weight2 ds a dx"
    integers = "stride0 stride1 stride2 turn0 turn1 turn2 M K Q N0 N1 N2"
    launches = lora_linear.DROPPED_INPUT_GRADIENT if dropout else lora_linear.INPUT_GRADIENT
    for count in (1, 2, 3):
        yield _lora(
            f"input gradient of {count}, rank {rank}{', dropout' if dropout else ''}, {element}",
            (lora_linear.input_gradient_kernel, launches),
            {**_types(element, pointers, "", integers), **_DROPOUT},
            {"PRECISION": "tf32", "DROPOUT": dropout, "BLOCK_R": rank, "COUNT": count, "GROUP": 8},
        )


def _lora(
    name: str, kernel: tuple[Any, Launches], types: Mapping[str, str], constants: Mapping[str, Any]
) -> Case:
    return Case(
        op="lora_linear",
        name=f"lora_linear: {name}",
        kernel=kernel[0],
        launches=kernel[1],
        types=types,
        # The number of rows is whatever a batch holds.
        aligned=frozenset(argument for argument, kind in types.items() if kind == "i32" and argument != "M"),
        constants=constants,
    )


def _grouped_cases(element: str) -> Iterator[Case]:
    expand = _types(element, "x weight bias s b y", "", "x_stride weight_stride M N K R")
    yield _grouped("expand", element, (grouped.expand_kernel, grouped.EXPAND), expand, HAS_BIAS=True, GROUP=8)
    gradient = _types(element, "grad weight ds a dx", "", "grad_stride weight_stride M N K R")
    for dropout in (False, True):
        kernel = grouped.input_gradient_kernel, grouped.INPUT_GRADIENT
        name = f"input gradient{', dropout' if dropout else ''}"
        yield _grouped(name, element, kernel, gradient, GROUP=8, DROPOUT=dropout)
    for rank in _RANKS:
        kernel = grouped.rank_gradients_kernel, grouped.RANK_GRADIENTS
        types = _types(element, "grad s b ds", "", "grad_stride N R")
        yield _grouped(f"rank gradients, rank {rank}", element, kernel, types, BLOCK_R=rank)
    for rank in _WIDE_RANKS:
        for dropout in (False, True):
            label = f", rank {rank}{', dropout' if dropout else ''}"
            shrink, gram = (grouped.shrink_kernel, grouped.SHRINK), (grouped.gram_kernel, grouped.GRAM)
            types = _types(element, "x a s", "", "x_stride K R")
            yield _grouped(f"shrink{label}", element, shrink, types, BLOCK_R=rank, DROPOUT=dropout)
            types = _types(element, "ds x", "", "x_stride K R")
            yield _grouped(f"gram{label}", element, gram, types, BLOCK_R=rank, DROPOUT=dropout)
    yield Case(
        op="grouped_lora_linear",
        name="grouped_lora_linear: sum of slices",
        kernel=grouped.sum_kernel,
        launches=grouped.SUM,
        types={"sums": "*i64"},
        is_matmul=False,
    )


def _grouped(
    name: str, element: str, kernel: tuple[Any, Launches], types: dict[str, str], **constants: Any
) -> Case:
    tables = {table: "*i64" for table in ("parts", "work", "bounds") if table in kernel[0].arg_names}
    return Case(
        op="grouped_lora_linear",
        name=f"grouped_lora_linear: {name}, {element}",
        kernel=kernel[0],
        launches=kernel[1],
        types={**types, **tables},
        aligned=frozenset(argument for argument, kind in types.items() if kind == "i32" and argument != "M"),
        constants={"PRECISION": "tf32", "BLOCK_R": 16, **constants},
    )


def _norm_cases(element: str) -> Iterator[Case]:
    for dim in (576, 4096, 16384):
        launch = rms_norm.launch_of(dim)
        types = _types(element, "x weight out", "inverse", "x_stride D")
        yield _norm(f"forward of {dim}", element, (rms_norm.forward_kernel, {"*": launch}), types)
        types = _types(element, "grad_out x weight grad_x", "inverse", "grad_stride x_stride D")
        yield _norm(f"backward of {dim}", element, (rms_norm.backward_kernel, {"*": launch}), types)


def _norm(name: str, element: str, kernel: tuple[Any, Launches], types: Mapping[str, str]) -> Case:
    numbers = {"offset": "fp32"} | ({"epsilon": "fp32"} if "epsilon" in kernel[0].arg_names else {})
    return Case(
        op="rms_norm",
        name=f"rms_norm: {name}, {element}",
        kernel=kernel[0],
        launches=kernel[1],
        types={**types, **numbers},
        aligned=frozenset({"x_stride", "grad_stride", "D"} & set(types)),
        is_matmul=False,
    )


def _rope_cases(element: str) -> Iterator[Case]:
    for heads, head_dim, rotary in ((9, 64, 64), (32, 128, 128), (24, 96, 72)):
        for transposed in (False, True):
            yield Case(
                op="rope",
                name=f"rope: {heads} heads of {head_dim}, {rotary} turned, {transposed=}, {element}",
                kernel=rope.rope_kernel,
                launches={"*": rope.launch_of(heads, head_dim, rotary)},
                types=_types(element, "x cos sin out", "", "token_stride head_stride H D R"),
                aligned=frozenset({"token_stride", "head_stride", "D"}),
                constants={"TRANSPOSED": transposed},
                is_matmul=False,
            )


def _gated_cases(element: str) -> Iterator[Case]:
    kernels = {
        "forward": (gated_activation.forward_kernel, "gate up out", "gate_stride up_stride F"),
        "backward": (
            gated_activation.backward_kernel,
            "grad gate up grad_gate grad_up",
            "grad_stride gate_stride up_stride F",
        ),
    }
    for name, (kernel, pointers, integers) in kernels.items():
        for gelu in (False, True):
            yield Case(
                op="gated_activation",
                name=f"gated_activation: {name}, {'gelu' if gelu else 'silu'}, {element}",
                kernel=kernel,
                launches={"*": gated_activation.LAUNCH},
                types=_types(element, pointers, "", integers),
                aligned=frozenset(integers.split()),
                constants={"GELU": gelu},
                is_matmul=False,
            )


def _loss_cases(element: str) -> Iterator[Case]:
    types = {
        **_types(element, "logits entropy_grads", "token_weight loss entropy", "row_stride V"),
        "target": "*i64",
        **dict.fromkeys(("softcap", "smoothing", "z_loss"), "fp32"),
    }
    for label, on in {
        "loss alone": (),
        "loss and gradient": ("GRADIENT",),
        "all options": ("GRADIENT", "WEIGHTED", "SOFTCAP"),
        "entropy and gradients": ("GRADIENT", "ENTROPY"),
    }.items():
        yield Case(
            op="linear_cross_entropy",
            name=f"linear_cross_entropy: rows, {label}, {element}",
            kernel=linear_cross_entropy.row_kernel,
            launches=linear_cross_entropy.ROW,
            types=types,
            aligned=frozenset({"row_stride", "V"}),
            constants={name: name in on for name in ("WEIGHTED", "GRADIENT", "ENTROPY", "SOFTCAP")},
            is_matmul=False,
        )
