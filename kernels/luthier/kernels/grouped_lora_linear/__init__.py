"""A frozen linear layer with the low-rank updates of many adapters in one batch, each on rows of its own.

Shape suffixes: M rows, K inputs, N outputs, R rank. Importing this package does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.kernels.tables import Impl, few_below, kernels_of, resolve

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraAdapter:
    """One adapter's update: scale (dropout(x) a^T) b^T.

    `a` [R, K] and `b` [N, R] are trained and may be float32 where x is bfloat16; `dropout` is the probability.
    """

    a: "Tensor"
    b: "Tensor"
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows that follow one another and belong to one adapter; -1: the base alone.

    `seed`, `stream` and `row0`, the number of its first row, decide dropout as in `lora_linear.Dropout`.
    """

    num_rows: int
    adapter: int
    seed: int = 0
    stream: int = 0
    row0: int = 0


def grouped_lora_linear(
    x_MK: "Tensor",
    weight_NK: "Tensor",
    bias_N: "Tensor | None",
    adapters: Sequence[LoraAdapter],
    segments: Sequence[Segment],
    *,
    impl: Impl = "auto",
) -> "Tensor":
    """X weight^T + bias, and on each segment's rows the update of its adapter: [M, N].

    The cost of the updates follows the sum of rows times ranks. A row has the bits that `lora_linear` gives it with
    its adapter alone, and so have the adapters' gradients, summed over their segments in order. Weight and bias are
    frozen. `cpu` is C++ (bfloat16 or float32), `triton` for GPUs; `eager` is plain torch, segment by segment; `auto`
    takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes, devices, adapters or segments do not fit, or `impl` cannot run on them.
    """
    _check(x_MK, weight_NK, bias_N, adapters, segments)
    why = _refusal(impl, x_MK, (weight_NK, bias_N), adapters)
    chosen = resolve("grouped_lora_linear", impl, why, x_MK, _shape_class(x_MK, segments))
    if chosen == "eager":
        from luthier.kernels.grouped_lora_linear.reference import grouped_lora_linear_reference

        return grouped_lora_linear_reference(x_MK, weight_NK, bias_N, adapters, segments)
    from luthier.kernels.direct import run
    from luthier.kernels.grouped_lora_linear.cpu import grouped_lora_linear_op

    outputs: list[Tensor] = run(
        chosen,
        grouped_lora_linear_op,
        x_MK,
        weight_NK,
        x_MK.new_empty(0) if bias_N is None else bias_N,
        [one.a for one in adapters] + [one.b for one in adapters],
        [one.scale for one in adapters] + [one.dropout for one in adapters],
        [number for one in segments for number in (one.num_rows, one.adapter)],
        [number for one in segments for number in (one.seed, one.stream, one.row0)],
    )
    return outputs[0]


def _shape_class(x_MK: "Tensor", segments: Sequence[Segment]) -> str:
    return shape_class(x_MK.shape[0], len(segments), x_MK.device.type)


def shape_class(rows: int, num_segments: int, device_type: str = "cpu") -> str:
    """The class of a problem in the table: few or many rows, in one or several segments."""
    size = "few" if rows < few_below(device_type, 512) else "many"
    return f"{size}_rows-{'one' if num_segments == 1 else 'several'}"


def _check(
    x_MK: "Tensor",
    weight_NK: "Tensor",
    bias_N: "Tensor | None",
    adapters: Sequence[LoraAdapter],
    segments: Sequence[Segment],
) -> None:
    from luthier.kernels.operands import require_same

    shapes = tuple(x_MK.shape), tuple(weight_NK.shape)
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"shapes must be x [M, K], weight [N, K], got {shapes}")
    require_same(x=x_MK, weight=weight_NK, **({} if bias_N is None else {"bias": bias_N}))
    N, K = shapes[1]
    if bias_N is not None and bias_N.shape != (N,):
        raise ValueError(f"bias must have shape ({N},), got {tuple(bias_N.shape)}")
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    device = x_MK.device
    for index, one in enumerate(adapters):
        of_a, of_b = one.a.shape, one.b.shape
        if len(of_a) != 2 or of_a[1] != K or of_b != (N, of_a[0]):
            raise ValueError(
                f"adapters[{index}] must have a [R, {K}] and b [{N}, R], got {(tuple(of_a), tuple(of_b))}"
            )
        if not 0 <= one.dropout < 1:
            raise ValueError(f"adapters[{index}].dropout must be in [0, 1), got {one.dropout}")
        if one.a.device != device or one.b.device != device:
            raise ValueError(f"adapters[{index}] must be on {device}, got {one.a.device}, {one.b.device}")
    total = sum(one.num_rows for one in segments)
    if total != shapes[0][0] or any(one.num_rows < 0 for one in segments):
        raise ValueError(
            f"segments must hold the {shapes[0][0]} rows of x, got {[s.num_rows for s in segments]}"
        )
    for index, segment in enumerate(segments):
        if not -1 <= segment.adapter < len(adapters):
            raise ValueError(
                f"segments[{index}].adapter must be in -1..{len(adapters) - 1}, got {segment.adapter}"
            )


def _refusal(
    impl: Impl,
    x_MK: "Tensor",
    base: tuple["Tensor", "Tensor | None"],
    adapters: Sequence[LoraAdapter],
) -> str | None:
    import torch

    from luthier.kernels.operands import refusal

    kernels = kernels_of(impl, x_MK)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in base):
        return f"impl {kernels!r} needs frozen weight and bias, got one that requires a gradient"
    types = {torch.float32, x_MK.dtype}
    for one in adapters:
        if one.a.dtype not in types or one.b.dtype not in types:
            return (
                f"impl {kernels!r} needs factors of {x_MK.dtype} or float32, got {one.a.dtype}, {one.b.dtype}"
            )
    return refusal(impl, x_MK)
