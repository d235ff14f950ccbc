"""Cross-entropy of a linear head without the logits of the whole batch.

Shape suffixes: N rows, D hidden size, V vocabulary, R rank. Importing this package does not import torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from luthier.kernels.tables import Impl, few_below, kernels_of, resolve

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_BUDGET_BYTES = 512 * 2**20
"""Most memory that logits may take at a time, where they are needed."""

BYTES_OF_LOGIT = 16
"""What plain torch takes for each logit: it and its gradient, in their own dtype and in float32."""


class LossSum(NamedTuple):
    """Summed loss and the number of rows it sums over; the caller divides, over all of its micro-batches."""

    loss_sum: "Tensor"
    num_valid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What is summed over the counted rows, with logits u and their log-sum-exp lse.

    token_weight * ((1 - label_smoothing) * (lse - u_target) + label_smoothing * (lse - mean u) + z_loss * lse^2)

    Attributes:
        ignore_index: rows with this target cost nothing and are not counted.
        label_smoothing: share of the loss that goes to the uniform distribution, in [0, 1).
        z_loss: weight of the squared log-sum-exp (arXiv:2204.02311), at least 0.
        softcap: u = softcap * tanh(logit / softcap); 0: u = logit.
        vocab_valid: only the first so many rows of the head are words, the others padding; 0: all are.
        budget_bytes: most memory for logits at a time, where plain torch or a GPU needs them.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    vocab_valid: int = 0
    budget_bytes: int = DEFAULT_BUDGET_BYTES


class HeadUpdate(NamedTuple):
    """A low-rank update of the head: weight + scale * b a, with a [R, D] and b [V, R]."""

    a: "Tensor"
    b: "Tensor"
    scale: float


_DEFAULTS = LossOptions()


def linear_cross_entropy(
    hidden_ND: "Tensor",
    weight_VD: "Tensor",
    target_N: "Tensor",
    *,
    token_weight_N: "Tensor | None" = None,
    update: HeadUpdate | None = None,
    options: LossOptions = _DEFAULTS,
    impl: Impl = "auto",
) -> LossSum:
    """Cross-entropy (natural log, float32 scalar) of softmax(hidden weight^T), summed over counted rows.

    `cpu` (C++; bfloat16 or float32; a head without update) never holds the logits of a frozen head, and the bits of a
    row's loss and gradient depend neither on the number of threads nor on the other rows; of a trained head it forms
    them in chunks of rows. `eager` is plain torch, in chunks of rows where the head is trained or updated, or where the
    logits of all rows would not keep to the budget. `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes, devices, targets or options do not fit, or `impl` cannot run on them.
    """
    check_head(hidden_ND, weight_VD, target_N)
    _check_options(hidden_ND, weight_VD, token_weight_N, update, options)
    num_words = options.vocab_valid or weight_VD.shape[0]
    num_valid, least, most = _counted(target_N, options.ignore_index)
    if num_valid and not (least >= 0 and most < num_words):
        raise ValueError(
            f"targets must lie in [0, {num_words}) or be {options.ignore_index}, got {least}..{most}"
        )
    refusal = head_refusal(impl, hidden_ND, weight_VD, update)
    shape = shape_class(num_valid, num_words, hidden_ND.device.type, is_trained=is_trained(weight_VD))
    chosen = resolve("linear_cross_entropy", impl, refusal, hidden_ND, shape)
    head_VD = weight_VD[:num_words]
    if chosen == "eager":
        from luthier.kernels.linear_cross_entropy.reference import (
            chunked_loss,
            linear_cross_entropy_reference,
        )

        fits = num_valid * num_words * BYTES_OF_LOGIT <= options.budget_bytes
        eager = linear_cross_entropy_reference if refusal is None and fits else chunked_loss
        words = None if update is None else update._replace(b=update.b[:num_words])
        return LossSum(eager(hidden_ND, head_VD, target_N, token_weight_N, words, options), num_valid)
    if is_trained(weight_VD):
        from luthier.kernels.linear.cpu import project
        from luthier.kernels.linear_cross_entropy.reference import chunked_loss

        total = chunked_loss(hidden_ND, head_VD, target_N, token_weight_N, None, options, project)
        return LossSum(total, num_valid)
    import torch

    from luthier.kernels.direct import run
    from luthier.kernels.linear_cross_entropy.cpu import linear_cross_entropy_op

    need_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    weight_N = hidden_ND.new_empty(0) if token_weight_N is None else token_weight_N.double()
    numbers = [options.softcap, options.label_smoothing, options.z_loss, float(options.budget_bytes)]
    given = (hidden_ND, head_VD, target_N, weight_N, options.ignore_index, numbers, need_grad)
    loss_sum, _, _ = run(chosen, linear_cross_entropy_op, *given)
    return LossSum(loss_sum, num_valid)


def _counted(target_N: "Tensor", ignore_index: int) -> tuple[int, int, int]:
    """How many targets count, the least and the greatest of them: by one transfer, for which a GPU is waited for."""
    import torch

    if target_N.numel() == 0:
        return 0, 0, 0
    is_counted = target_N != ignore_index
    bounds = torch.iinfo(torch.int64)
    least = target_N.masked_fill(~is_counted, bounds.max).min()
    most = target_N.masked_fill(~is_counted, bounds.min).max()
    num_valid, low, high = torch.stack([is_counted.sum(), least, most]).tolist()
    return num_valid, low, high


def is_trained(weight_VD: "Tensor") -> bool:
    """Whether a head gets a gradient just now."""
    import torch

    return weight_VD.requires_grad and torch.is_grad_enabled()


def shape_class(num_rows: int, vocab: int, device_type: str = "cpu", *, is_trained: bool = False) -> str:
    """The class of a problem in the table: few or many labelled rows, small or large vocabulary, a trained head."""
    size = "few" if num_rows < few_below(device_type, 128) else "many"
    return f"{size}_rows-{'small' if vocab < 8192 else 'large'}_vocab{'-trained' if is_trained else ''}"


def check_head(hidden_ND: "Tensor", weight_VD: "Tensor", target_N: "Tensor") -> None:
    """Check hidden states, head and targets against each other.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    import torch

    from luthier.kernels.operands import require_same

    shapes = tuple(hidden_ND.shape), tuple(weight_VD.shape), tuple(target_N.shape)
    fits = [len(shape) for shape in shapes] == [2, 2, 1]
    if not fits or shapes[0][1] != shapes[1][1] or shapes[0][0] != shapes[2][0] or 0 in shapes[1]:
        raise ValueError(f"shapes must be hidden [N, D], weight [V, D], target [N], got {shapes}")
    require_same(hidden=hidden_ND, weight=weight_VD)
    if target_N.dtype != torch.int64 or target_N.device != hidden_ND.device:
        raise ValueError(
            f"target must be int64 on {hidden_ND.device}, got {target_N.dtype} on {target_N.device}"
        )


def head_refusal(
    impl: Impl, hidden_ND: "Tensor", weight_VD: "Tensor", update: HeadUpdate | None
) -> str | None:
    """Why the kernels for `impl` cannot run on these inputs, or None."""
    from luthier.kernels.operands import refusal

    kernels = kernels_of(impl, hidden_ND)
    if is_trained(weight_VD) and kernels == "triton":
        return f"impl {kernels!r} needs a frozen head, got weight.requires_grad=True"
    if update is not None:
        return f"impl {kernels!r} needs a head without an update, got one"
    return refusal(impl, hidden_ND)


def _check_options(
    hidden_ND: "Tensor",
    weight_VD: "Tensor",
    token_weight_N: "Tensor | None",
    update: HeadUpdate | None,
    options: LossOptions,
) -> None:
    if not 0 <= options.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {options.label_smoothing}")
    if min(options.z_loss, options.softcap) < 0 or options.budget_bytes < 1:
        raise ValueError(f"z_loss and softcap must be at least 0, budget_bytes at least 1, got {options}")
    if not 0 <= options.vocab_valid <= weight_VD.shape[0]:
        raise ValueError(f"vocab_valid must be in 0..{weight_VD.shape[0]}, got {options.vocab_valid}")
    if token_weight_N is not None and token_weight_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"token_weight must have shape ({hidden_ND.shape[0]},), got {tuple(token_weight_N.shape)}"
        )
    if token_weight_N is not None and token_weight_N.requires_grad:
        raise ValueError("token_weight gets no gradient, got token_weight.requires_grad=True")
    if update is not None:
        shapes = tuple(update.a.shape), tuple(update.b.shape)
        V, D = weight_VD.shape
        fits = len(shapes[0]) == 2 and shapes[0][1] == D and shapes[1] == (V, shapes[0][0])
        if not fits:
            raise ValueError(f"the update's shapes must be a [R, {D}], b [{V}, R], got {shapes}")
