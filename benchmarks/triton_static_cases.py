"""The Triton kernels in the configurations that `triton_static.py` compiles them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.kernels.dequantise import triton_kernels as dequantise
from luthier.kernels.gated_activation import triton as gated_activation
from luthier.kernels.gpu import Launches
from luthier.kernels.grouped_lora_linear import triton_kernels as grouped
from luthier.kernels.linear_cross_entropy import triton as linear_cross_entropy
from luthier.kernels.lora_linear import triton_kernels as lora_linear
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
        left_rows: rows of the left side of its products; none: BLOCK_M of its launch.
        targets: the chips it is for; none: all.
    """

    op: str
    name: str
    kernel: Any
    launches: Launches
    types: Mapping[str, str]
    aligned: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    is_matmul: bool = True
    left_rows: int | None = None
    targets: frozenset[str] = frozenset()

    def is_for(self, target: str) -> bool:
        """Tell whether the kernel is for a chip."""
        return not self.targets or target in self.targets


def cases() -> Iterator[Case]:
    """Every kernel in every configuration."""
    for element in ("bf16",):
        yield from _lora_cases(element)
        yield from _grouped_cases(element)
        yield from _norm_cases(element)
        yield from _rope_cases(element)
        yield from _gated_cases(element)
        yield from _loss_cases(element)
        for name, together in (("int8", 0), ("nf4", 256)):
            yield from _packed_cases(element, name, together)


def _types(element: str, pointers: str, floats: str, integers: str) -> dict[str, str]:
    """Types of arguments named in three lists of words."""
    return {
        **dict.fromkeys(pointers.split(), f"*{element}"),
        **dict.fromkeys(floats.split(), "*fp32"),
        **dict.fromkeys(integers.split(), "i32"),
    }


def _lora_cases(element: str) -> Iterator[Case]:
    for rank in _RANKS:
        yield _expand_case(element, rank)
        for dropout in (False, True):
            yield from _input_gradient_cases(element, rank, dropout)
    for rank in _WIDE_RANKS:
        yield from _thin_cases(element, rank)
    yield _round_case(element)
    yield Case(
        op="lora_linear",
        name=f"lora_linear: sum of slices, {element}",
        kernel=lora_linear.sum_slices_kernel,
        launches={"*": lora_linear.SUM},
        types={"slices": "*fp32", "out": "*fp32", "count": "i32", "size": "i32"},
        aligned=frozenset({"size"}),
        is_matmul=False,
    )


def _expand_case(element: str, rank: int) -> Case:
    """Tiles come and go by the copy engine that Hopper brought."""
    m, n, k = (lora_linear.EXPAND["*"].tiles[f"BLOCK_{name}"] for name in "MNK")
    tiles = {"x": (m, k), "weight": (n, k), "y": (m, n // 2)}
    case = _lora(
        f"expand, rank {rank}, {element}",
        (lora_linear.expand_kernel, lora_linear.EXPAND),
        {
            **{name: f"tensordesc<{element}[{rows}, {columns}]>" for name, (rows, columns) in tiles.items()},
            **_types(element, "s b bias", "", "s_stride M N K R"),
        },
        {"BLOCK_R": rank, "HAS_BIAS": True, "PROGRAMS": 132, "GROUP": 8},
    )
    return replace(case, targets=frozenset({"sm_90", "sm_100"}))


def _thin_cases(element: str, rank: int) -> Iterator[Case]:
    """The thin products that are ours: with dropout, and those whose result the library would round."""
    constants = {"PRECISION": "tf32", "BLOCK_Q": rank}
    yield _lora(
        f"shrink, rank {rank}, dropout, {element}",
        (lora_linear.shrink_kernel, lora_linear.SHRINK),
        {**_types(element, "x a s", "", "x_stride s_stride M K Q"), **_DROPOUT},
        constants,
    )
    types = _types(element, "low x", "slices", "low_stride x_stride M Q K slice_rows")
    for dropout in (False, True):
        yield _lora(
            f"gram, rank {rank}{', dropout' if dropout else ''}, {element}",
            (lora_linear.gram_kernel, lora_linear.GRAM),
            {**types, **_DROPOUT},
            {**constants, "DROPOUT": dropout},
        )


def _round_case(element: str) -> Case:
    numbers = [name for name in lora_linear.round_kernel.arg_names if name.startswith(("size", "start"))]
    return Case(
        op="lora_linear",
        name=f"lora_linear: rounded factors, {element}",
        kernel=lora_linear.round_kernel,
        launches={"*": lora_linear.ROUND},
        types={
            **_types(element, "out", "a0 a1 a2 b0 b1 b2", " ".join(numbers)),
            **dict.fromkeys(("scale0", "scale1", "scale2"), "fp32"),
        },
        constants={"COUNT": 3},
        is_matmul=False,
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
            {
                "PRECISION": "tf32",
                "DROPOUT": dropout,
                "EVEN": True,
                "BLOCK_R": rank,
                "COUNT": count,
                "GROUP": 8,
            },
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
    yield _grouped(
        "expand", element, (grouped.expand_kernel, grouped.EXPAND), expand, HAS_BIAS=True, EVEN=True, GROUP=8
    )
    gradient = _types(element, "grad weight ds a dx", "", "grad_stride weight_stride M N K R")
    for dropout in (False, True):
        kernel = grouped.input_gradient_kernel, grouped.INPUT_GRADIENT
        name = f"input gradient{', dropout' if dropout else ''}"
        yield _grouped(name, element, kernel, gradient, GROUP=8, EVEN=True, DROPOUT=dropout)
    for rank in _WIDE_RANKS:
        for dropout in (False, True):
            label = f", rank {rank}{', dropout' if dropout else ''}"
            shrink, gram = (grouped.shrink_kernel, grouped.SHRINK), (grouped.gram_kernel, grouped.GRAM)
            types = _types(element, "x a s", "", "x_stride K R")
            yield _grouped(f"shrink{label}", element, shrink, types, BLOCK_R=rank, DROPOUT=dropout)
            types = _types(element, "low x", "", "x_stride K R")
            scaled = not dropout  # of dB, which no dropout is in, or of dA
            yield _grouped(f"gram{label}", element, gram, types, BLOCK_R=rank, DROPOUT=dropout, SCALED=scaled)
    yield Case(
        op="grouped_lora_linear",
        name="grouped_lora_linear: sum of slices",
        kernel=grouped.sum_kernel,
        launches={"*": grouped.SUM},
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


def _packed_cases(element: str, name: str, together: int) -> Iterator[Case]:
    """What reads the codes of a weight: products with few rows, in slices, and with many, and its numbers alone."""
    weight = {
        "codes": "*u8" if together else "*i8",
        "scales": "*i8" if together else "*fp32",
        **dict.fromkeys(("factors", "mean", "levels"), f"*{element}" if together else "*fp32"),
    }
    constants = {"TOGETHER": together, "EVEN": True, "COLUMNS": dequantise.COLUMNS}
    label, out = f"{name}, {element}", f"*{element}"
    for rows in (16, 64):
        yield from _packed_products(f"{rows} rows, {label}", weight, constants, rows)
    product, gradient = _packed_products(f"16 rows, {label}", weight, constants, 16)
    yield _with_one(product, "M")
    yield _with_one(gradient, "R")
    yield from _packed_products(f"many rows, {label}", weight, constants, None)
    kernel = dequantise.numbers_kernel, {"*": dequantise.NUMBERS}
    types = {**weight, "out": out, "N": "i32", "K": "i32"}
    yield replace(_packed(f"numbers, {label}", kernel, types, constants), is_matmul=False)
    kernel = dequantise.finish_kernel, {"*": dequantise.FINISH}
    types = _types(element, "bias out", "slices", "count size N")
    case = _packed(f"sum of slices, {label}", kernel, types, {"HAS_BIAS": True, "ADDS": True})
    yield replace(case, aligned=frozenset({"size", "N"}), is_matmul=False)


def _with_one(case: Case, argument: str) -> Case:
    """A case in which Triton makes a constant of an argument, as it does of every integer that is 1."""
    types = {name: kind for name, kind in case.types.items() if name != argument}
    return replace(
        case, name=f"{case.name}, {argument} = 1", types=types, constants={**case.constants, argument: 1}
    )


def _packed_products(
    label: str, weight: Mapping[str, str], constants: Mapping[str, Any], rows: int | None
) -> Iterator[Case]:
    """There and back with tiles of so many rows, whose slices are float32, or with those of many, which have none."""
    few = rows is not None
    fixed = {
        **constants,
        "PRECISION": "tf32",
        "GROUP": 8,
        "BLOCK_R": 16,
        **({"BLOCK_M": rows} if few else {}),
    }
    out = {"out": "*fp32" if few else "*bf16"}
    launches = dequantise.FEW if few else dequantise.MANY
    case = _packed(
        f"product, {label}",
        (dequantise.product_kernel, launches),
        {**weight, **_types("bf16", "x low b bias", "", "x_stride low_stride M N K R slice_columns"), **out},
        {**fixed, "HAS_BIAS": not few},
    )
    # The weight's numbers are the left side, whose rows are outputs.
    yield replace(case, left_rows=launches["*"].tiles["BLOCK_N"])
    case = _packed(
        f"gradient, {label}",
        (dequantise.input_gradient_kernel, dequantise.FEW_GRADIENT if few else dequantise.MANY_GRADIENT),
        {**weight, **_types("bf16", "grad low a", "", "grad_stride low_stride M N K R slice_outputs"), **out},
        {**fixed, "WHOLE": True, "ADDS": not few},
    )
    yield replace(case, left_rows=rows)


def _packed(
    name: str, kernel: tuple[Any, Launches], types: Mapping[str, str], constants: Mapping[str, Any]
) -> Case:
    return replace(_lora(name, kernel, types, constants), op="dequantise", name=f"dequantise: {name}")
