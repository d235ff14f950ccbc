"""Frozen linear layers with low-rank updates (LoRA, arXiv:2106.09685).

Shape suffixes: M rows, K inputs, N outputs, R rank. Importing this package does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.kernels.dequantise import is_quantised
from luthier.kernels.tables import Impl, forced, kernels_of, resolve

if TYPE_CHECKING:
    from torch import Tensor


MAX_TRITON_PROJECTIONS = 3
"""Most projections that one product of the Triton kernels takes the gradients of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One linear layer and its update: y = x weight^T + bias + scale (dropout(x) a^T) b^T + scale lora_bias.

    `weight` [N, K] and `bias` [N] or None are frozen; `a` [R, K], `b` [N, R] and `lora_bias` [N] or None are
    trained and may be float32 where x is bfloat16: they are rounded as they are used, never copied for keeps.
    """

    weight: "Tensor"
    a: "Tensor"
    b: "Tensor"
    scale: float
    bias: "Tensor | None" = None
    lora_bias: "Tensor | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Inverted dropout of x on its way into the update, from counters instead of a state.

    An element is dropped by (seed, stream, number of its row, column) alone: the same on every device, however rows
    are put together. `stream` tells layers apart. Rows are numbered from `row0` on, and from each of `restarts` (place
    in x, number) on anew; places rise. With the number of a sequence above that of a token (`token_number`), a token's
    mask does not depend on what it is packed with.
    """

    probability: float
    seed: int
    stream: int = 0
    row0: int = 0
    restarts: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> tuple[int, ...]:
        """(seed, stream, row0), then place and number of each restart."""
        return (
            self.seed,
            self.stream,
            self.row0,
            *(number for restart in self.restarts for number in restart),
        )


def token_number(sequence: int, token: int = 0) -> int:
    """The number that dropout knows a token by: of 2^31 sequences with 2^32 tokens each, no two share one."""
    return sequence << 32 | token


def lora_linear(
    x: "Tensor", projection: Projection, *, dropout: Dropout | None = None, impl: Impl = "auto"
) -> "Tensor":
    """One projection of x [..., K] -> [..., N]; see `lora_linear_multi`."""
    return lora_linear_multi(x, [projection], dropout=dropout, impl=impl)[0]


def lora_linear_multi(
    x: "Tensor", projections: Sequence[Projection], *, dropout: Dropout | None = None, impl: Impl = "auto"
) -> list["Tensor"]:
    """Several projections of the same x [..., K], such as q/k/v or gate/up: x A^T and dx are one product each.

    They share one dropout mask. Weights get no gradient. `cpu` (C++; bfloat16 or float32) accumulates in float32,
    and the bits of a row depend neither on the number of threads nor on the other rows; `eager` is plain torch;
    `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
    """
    _check(x, projections, dropout)
    dropout = dropout or Dropout(probability=0.0, seed=0)
    refusal = _refusal(impl, x, projections, dropout)
    chosen = resolve("lora_linear", impl, refusal, x, _shape_class(x, projections))
    if chosen == "eager" and impl == "auto" and refusal is None and _reads_codes(x, projections):
        chosen = "triton"
    x_MK = x.reshape(-1, x.shape[-1])
    biases = [_bias(one) for one in projections]
    if chosen == "eager":
        outputs = _run_eager(x_MK, projections, biases, dropout)
    else:
        outputs = _run_kernels(chosen, x_MK, projections, biases, dropout)
    return [output.view(*x.shape[:-1], output.shape[1]) for output in outputs]


def _reads_codes(x: "Tensor", projections: Sequence[Projection]) -> bool:
    """Whether all bases are products that read codes, which plain torch has not, whatever updates weigh beside them.

    A call that is watched would be given numbers in place of codes.
    """
    if x.device.type != "cuda" or not all(is_quantised(one.weight) for one in projections):
        return False
    from luthier.kernels.direct import is_watched
    from luthier.kernels.linear import reads_codes

    if forced() != "auto" or is_watched([x, *(factor for one in projections for factor in (one.a, one.b))]):
        return False
    return all(reads_codes(x, one.weight) for one in projections)


def _bias(projection: Projection) -> "Tensor | None":
    if projection.lora_bias is None:
        return projection.bias
    update = (projection.lora_bias * projection.scale).to(projection.weight.dtype)
    return update if projection.bias is None else projection.bias + update


def _run_kernels(
    chosen: str,
    x_MK: "Tensor",
    projections: Sequence[Projection],
    biases: Sequence["Tensor | None"],
    dropout: Dropout,
) -> list["Tensor"]:
    from luthier.kernels.direct import run
    from luthier.kernels.lora_linear.cpu import lora_linear_op

    outputs: list[Tensor] = run(
        chosen,
        lora_linear_op,
        x_MK,
        [one.weight for one in projections],
        [x_MK.new_empty(0) if bias is None else bias for bias in biases],
        [one.a for one in projections] + [one.b for one in projections],
        [*(one.scale for one in projections), dropout.probability],
        list(dropout.key),
    )
    return outputs[: len(projections)]


def _run_eager(
    x_MK: "Tensor", projections: Sequence[Projection], biases: Sequence["Tensor | None"], dropout: Dropout
) -> list["Tensor"]:
    from luthier.kernels.lora_linear.reference import dropped, lora_linear_reference

    dropped_MK = dropped(x_MK, dropout.probability, dropout.key)
    return [
        lora_linear_reference(x_MK, dropped_MK, one.weight, bias, (one.a, one.b, one.scale))
        for one, bias in zip(projections, biases, strict=True)
    ]


def _check(x: "Tensor", projections: Sequence[Projection], dropout: Dropout | None) -> None:
    from luthier.kernels.operands import require_same

    if not projections:
        raise ValueError("projections must hold at least one projection, got none")
    if dropout is not None and not 0 <= dropout.probability < 1:
        raise ValueError(f"dropout probability must be in [0, 1), got {dropout.probability}")
    places = [0, *(place for place, _ in dropout.restarts)] if dropout else []
    if any(place >= later for place, later in pairwise(places)):
        raise ValueError(f"places of dropout's restarts must rise from above 0, got {places[1:]}")
    for one in projections:
        require_same(x=x, weight=one.weight, **({} if one.bias is None else {"bias": one.bias}))
        if not _fits(x, one):
            shapes = [tuple(tensor.shape) for tensor in (x, one.weight, one.a, one.b)]
            raise ValueError(f"shapes must be x [..., K], weight [N, K], a [R, K], b [N, R], got {shapes}")
        for name, bias in (("bias", one.bias), ("lora_bias", one.lora_bias)):
            if bias is not None and bias.shape != one.weight.shape[:1]:
                raise ValueError(f"{name} must have shape ({one.weight.shape[0]},), got {tuple(bias.shape)}")
        if len({x.device, one.a.device, one.b.device}) != 1:
            raise ValueError(f"tensors must share a device, got {x.device}, {one.a.device}, {one.b.device}")


def _fits(x: "Tensor", projection: Projection) -> bool:
    # Looked at in every layer of every pass, so that no shape is copied.
    weight, a, b = projection.weight.shape, projection.a.shape, projection.b.shape
    if x.dim() < 1 or not len(weight) == len(a) == len(b) == 2:
        return False
    return x.shape[-1] == weight[1] == a[1] and b == (weight[0], a[0])


def _refusal(impl: Impl, x: "Tensor", projections: Sequence[Projection], dropout: Dropout) -> str | None:
    import torch

    from luthier.kernels.operands import refusal

    kernels = kernels_of(impl, x)
    factor_types = {torch.float32, x.dtype}
    for one in projections:
        if one.weight.requires_grad and torch.is_grad_enabled():
            return f"impl {kernels!r} needs frozen weights, got weight.requires_grad=True"
        if not {one.a.dtype, one.b.dtype} <= factor_types:
            return f"impl {kernels!r} needs factors of {x.dtype} or float32, got {one.a.dtype}, {one.b.dtype}"
    if kernels == "triton" and len(projections) > MAX_TRITON_PROJECTIONS:
        return f"impl 'triton' takes at most {MAX_TRITON_PROJECTIONS} projections, got {len(projections)}"
    if kernels == "triton" and dropout.probability and dropout.restarts:
        return "impl 'triton' drops rows that are numbered through, got restarts"
    return refusal(impl, x)


def _shape_class(x: "Tensor", projections: Sequence[Projection]) -> str:
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    rank = max(one.a.shape[0] for one in projections)
    if x.device.type != "cuda":
        return shape_class(rows, rank, len(projections))
    outputs = sum(one.weight.shape[0] for one in projections)
    return gpu_shape_class(rows, rank, len(projections), rows * x.shape[-1] * outputs)


def gpu_shape_class(rows: int, rank: int, num_projections: int, products: int) -> str:
    """The class of a problem on a GPU, of so many multiplications with frozen weights.

    From 2**37 on they take longer than the host needs for the call, whatever it does.
    """
    size = "vast" if products >= 2**37 else "few" if rows < 64 else "some" if rows < 1024 else "many"
    return _class_of(size, rank, num_projections)


def shape_class(rows: int, rank: int, num_projections: int) -> str:
    """The class of a problem in the table: few, some or many rows; a small or large rank; one projection or several."""
    return _class_of("few" if rows < 64 else "some" if rows < 512 else "many", rank, num_projections)


def _class_of(size: str, rank: int, num_projections: int) -> str:
    rank_class = "small" if rank <= 32 else "large"
    return f"{size}_rows-{rank_class}_rank-{'one' if num_projections == 1 else 'several'}"
