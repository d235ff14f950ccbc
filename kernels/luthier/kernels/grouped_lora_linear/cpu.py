"""`grouped_lora_linear` in C++ as torch custom ops: products whose low-rank terms belong to some rows each.

Shape suffixes: M rows, K inputs, N outputs, R the greatest rank, Q the ranks of all adapters together.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.kernels import _core
from luthier.kernels.direct import kernel_op
from luthier.kernels.lora_linear.cpu import dropped, fake_gradient_of_b
from luthier.kernels.operands import row_pointer, rows_of, settings
from luthier.kernels.products import Matrix, matrix_of


class Part(NamedTuple):
    """Rows [first, end) that take one adapter: its index, its place among all ranks, its rank, its dropout.

    A tuple, for a batch makes one of each segment in every pass, and a dataclass takes three times as long to make.
    """

    first: int
    end: int
    adapter: int
    place: int
    rank: int
    probability: float
    key: list[int]

    def term(
        self, rows: tuple[int, int], matrix: tuple[int, int], contracted: int, columns: int, turned: bool
    ) -> Any:
        """A term of these rows alone; `rows` and `matrix` are (address, row stride)."""
        return (*rows, *matrix, contracted, turned), self.first, self.end, columns


def _rounded(factors: list[Tensor], numbers: list[float], dtype: torch.dtype) -> Tensor:
    """All A, then all B times their scales, one after the other, rounded to the activations' type."""
    count = len(factors) // 2
    held = [factor.float().contiguous() for factor in factors]
    sizes = [factor.numel() for factor in held]
    out = torch.empty(sum(sizes), dtype=dtype, device="cpu")
    places = accumulate((size * out.element_size() for size in sizes), initial=out.data_ptr())
    scales = [*[1.0] * count, *numbers[:count]]
    problems = [
        (factor.data_ptr(), place, size, scale)
        for factor, place, size, scale in zip(held, places, sizes, scales, strict=False)
    ]
    _core.round_to(problems=problems, bfloat16=dtype == torch.bfloat16, **settings())
    return out


class _Factors:
    """Where each adapter's rounded A [rank, K] and scaled B [N, rank] stand."""

    def __init__(self, rounded: Tensor, factors: list[Tensor]) -> None:
        count = len(factors) // 2
        self.ranks = [a.shape[0] for a in factors[:count]]
        self._start, self._item = rounded.data_ptr(), rounded.element_size()
        self.num_inputs, self._outputs = factors[0].shape[1], factors[count].shape[0]
        self._rank_sum = sum(self.ranks)

    def a(self, part: Part) -> tuple[int, int]:
        """(address, row stride) of a part's A."""
        return self._start + part.place * self.num_inputs * self._item, self.num_inputs

    def b(self, part: Part) -> tuple[int, int]:
        """(address, row stride) of a part's B."""
        before = self._rank_sum * self.num_inputs + part.place * self._outputs
        return self._start + before * self._item, part.rank


def parts_of(factors: list[Tensor], numbers: list[float], segments: list[int], keys: list[int]) -> list[Part]:
    """The segments that hold rows and have an adapter, in order."""
    count = len(factors) // 2
    ranks = [a.shape[0] for a in factors[:count]]
    places, bounds = [0, *accumulate(ranks)], [0, *accumulate(segments[::2])]
    return [
        Part(
            bounds[index],
            bounds[index + 1],
            adapter,
            places[adapter],
            ranks[adapter],
            numbers[count + adapter],
            keys[3 * index : 3 * index + 3],
        )
        for index, adapter in enumerate(segments[1::2])
        if adapter >= 0 and bounds[index + 1] > bounds[index]
    ]


def _product(
    terms: list[Any], out_MN: Tensor, bias_N: Tensor | None = None, addend_MN: Tensor | None = None
) -> Tensor:
    _core.product(
        terms=terms,
        num_rows=out_MN.shape[0],
        num_columns=out_MN.shape[1],
        bias=0 if bias_N is None else bias_N.data_ptr(),
        addend=row_pointer(addend_MN),
        out=row_pointer(out_MN),
        float_out=False,
        bfloat16=out_MN.dtype == torch.bfloat16,
        **settings(),
    )
    return out_MN


def _kept(x_MK: Tensor, parts: list[Part]) -> Tensor:
    """X with each part's elements dropped by its own key; x itself where nothing is dropped."""
    if not any(part.probability for part in parts):
        return x_MK
    out_MK = x_MK.clone()
    for part in parts:
        if part.probability:
            out_MK[part.first : part.end] = dropped(x_MK[part.first : part.end], part.probability, part.key)
    return out_MK


@kernel_op("luthier::grouped_lora_linear")
def grouped_lora_linear_op(
    x_MK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor,
    factors: list[Tensor],
    numbers: list[float],
    segments: list[int],
    keys: list[int],
) -> list[Tensor]:
    """[y [M, N], S [M, R], all factors rounded]; weight and bias (none if of no elements) are taken as frozen.

    `factors` are all A, then all B; `numbers` all scales, then all probabilities of dropout; `segments` rows and
    adapter of each; `keys` seed, stream and first row of each.
    """
    x_MK, weight = rows_of(x_MK), matrix_of(weight_NK)
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    rounded = _rounded(factors, numbers, x_MK.dtype)
    parts, stand = parts_of(factors, numbers, segments, keys), _Factors(rounded, factors)
    kept_MK = _kept(x_MK, parts)
    kept = row_pointer(kept_MK)
    shrink = [part.term(kept, stand.a(part), K, part.rank, True) for part in parts]
    s_MR = _product(shrink, torch.empty(M, max(stand.ranks), dtype=x_MK.dtype, device="cpu"))
    base, low = (*row_pointer(x_MK), *weight.place, K, True), row_pointer(s_MR)
    expand = [part.term(low, stand.b(part), part.rank, N, True) for part in parts]
    bias = bias_N.contiguous() if bias_N.numel() else None
    y_MN = _product([base, *expand], torch.empty(M, N, dtype=x_MK.dtype, device="cpu"), bias)
    return [y_MN, s_MR, rounded]


@grouped_lora_linear_op.register_fake
def _(
    x_MK: Tensor,
    weight_NK: Tensor,
    _bias_N: Tensor,
    factors: list[Tensor],
    _numbers: list[float],
    _segments: list[int],
    _keys: list[int],
) -> list[Tensor]:
    M, rank = x_MK.shape[0], max(a.shape[0] for a in factors[: len(factors) // 2])
    size = sum(factor.numel() for factor in factors)
    return [x_MK.new_empty(M, weight_NK.shape[0]), x_MK.new_empty(M, rank), x_MK.new_empty(size)]


@kernel_op("luthier::grouped_lora_linear_backward")
def grouped_lora_linear_backward_op(
    grad_MN: Tensor,
    saved: list[Tensor],
    factors: list[Tensor],
    numbers: list[float],
    segments: list[int],
    keys: list[int],
    need_input: bool,
) -> list[Tensor]:
    """[dx (empty if not needed), dA..., dB...], the last two float32.

    `saved` are x, weight, S and the rounded factors.
    """
    x_MK, s_MR = rows_of(saved[0]), saved[2]
    grad_MN, N = rows_of(grad_MN), grad_MN.shape[1]
    parts, stand = parts_of(factors, numbers, segments, keys), _Factors(saved[3], factors)
    dy = row_pointer(grad_MN)
    shrink = [part.term(dy, stand.b(part), N, part.rank, False) for part in parts]
    ds_MR = _product(shrink, torch.empty_like(s_MR))
    sides = (
        _Side(low=ds_MR, right=_kept(x_MK, parts), scales=[1.0] * len(stand.ranks), transposed=False),
        _Side(low=s_MR, right=grad_MN, scales=numbers, transposed=True),
    )
    grads_a, grads_b = _factor_gradients(sides, parts, stand.ranks)
    dx_MK = x_MK.new_empty(0)
    if need_input:
        dx_MK = _input_gradient(grad_MN, matrix_of(saved[1]), ds_MR, stand, parts)
    return [dx_MK, *grads_a, *grads_b]


@grouped_lora_linear_backward_op.register_fake
def _(
    grad_MN: Tensor,
    saved: list[Tensor],
    factors: list[Tensor],
    _numbers: list[float],
    _segments: list[int],
    _keys: list[int],
    need_input: bool,
) -> list[Tensor]:
    count = len(factors) // 2
    grads_a = [a.new_empty(a.shape, dtype=torch.float32) for a in factors[:count]]
    grads_b = [fake_gradient_of_b(b) for b in factors[count:]]
    return [grad_MN.new_empty(saved[0].shape if need_input else (0,)), *grads_a, *grads_b]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What the gradients of all A, or of all B, are made of: scale * low^T right for each adapter, or its transpose."""

    low: Tensor
    right: Tensor
    scales: list[float]
    transposed: bool

    def shape(self, rank: int) -> tuple[int, int]:
        """Of the gradient of a factor of this rank."""
        columns = self.right.shape[1]
        return (columns, rank) if self.transposed else (rank, columns)

    def gradients(self, parts: list[Part], num_adapters: int) -> tuple[list[Any], list[list[Tensor]]]:
        """The problems for `_core.gram`, one for each part, and where it will put each adapter's results."""
        item, columns = self.right.element_size(), self.right.shape[1]
        (left, left_stride), (right, right_stride) = row_pointer(self.low), row_pointer(self.right)
        problems = []
        found: list[list[Tensor]] = [[] for _ in range(num_adapters)]
        for part in parts:
            out = torch.empty(self.shape(part.rank), dtype=torch.float32, device="cpu")
            low = left + part.first * left_stride * item, left_stride
            rows = *low, right + part.first * right_stride * item, right_stride, part.end - part.first
            scale = self.scales[part.adapter]
            problems.append((*rows, part.rank, columns, scale, out.data_ptr(), self.transposed))
            found[part.adapter].append(out)
        return problems, found


def _factor_gradients(sides: tuple[_Side, ...], parts: list[Part], ranks: list[int]) -> list[list[Tensor]]:
    """Of each side, the gradient of each adapter's factor, float32; parts of one adapter are added in order."""
    made = [side.gradients(parts, len(ranks)) for side in sides]
    problems = [one for of_side, _ in made for one in of_side]
    _core.gram(problems=problems, bfloat16=sides[0].right.dtype == torch.bfloat16, **settings())
    return [
        [
            reduce(torch.add, outs) if outs else torch.zeros(side.shape(rank), device="cpu")
            for outs, rank in zip(found, ranks, strict=True)
        ]
        for side, (_, found) in zip(sides, made, strict=True)
    ]


def _input_gradient(
    grad_MN: Tensor, weight: Matrix, ds_MR: Tensor, stand: _Factors, parts: list[Part]
) -> Tensor:
    (M, N), K, ds = grad_MN.shape, stand.num_inputs, row_pointer(ds_MR)

    def low(of: list[Part]) -> list[Any]:
        return [part.term(ds, stand.a(part), part.rank, K, False) for part in of]

    addend_MK = None
    if masked := [part for part in parts if part.probability]:
        addend_MK = _kept(_product(low(masked), torch.empty(M, K, dtype=grad_MN.dtype, device="cpu")), masked)
    base = (*row_pointer(grad_MN), *weight.place, N, False)
    terms = [*low([part for part in parts if not part.probability]), base]
    return _product(terms, torch.empty(M, K, dtype=grad_MN.dtype, device="cpu"), addend_MN=addend_MK)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_MK, weight_NK, bias_N, factors, *settings_of = inputs
    if weight_NK.requires_grad or bias_N.requires_grad:
        raise ValueError("our kernels need frozen weight and bias, got one that requires a gradient")
    ctx.save_for_backward(x_MK, weight_NK, *output[1:], *factors)
    ctx.settings = settings_of


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x_MK, weight_NK, s_MR, rounded, *factors = ctx.saved_tensors
    need_input = ctx.needs_input_grad[0]
    found = grouped_lora_linear_backward_op(
        grads[0], [x_MK, weight_NK, s_MR, rounded], factors, *ctx.settings, need_input
    )
    of_factors = [grad.to(factor.dtype) for grad, factor in zip(found[1:], factors, strict=True)]
    return found[0] if need_input else None, None, None, of_factors, None, None, None


grouped_lora_linear_op.register_autograd(_backward, _keep)
