"""Cross-entropy of a linear head without the logits of the whole batch.

Shape suffixes: N rows, D hidden size, V vocabulary. Importing this package does not import torch.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from luthier.kernels.linear_cross_entropy.table import choose, key

if TYPE_CHECKING:
    from torch import Tensor

Impl = Literal["auto", "cpu", "eager"]


class LossSum(NamedTuple):
    """Summed loss and the number of rows it sums over; the caller divides, over all of its micro-batches."""

    loss_sum: "Tensor"
    num_valid: int


def linear_cross_entropy(
    hidden_ND: "Tensor",
    weight_VD: "Tensor",
    target_N: "Tensor",
    *,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> LossSum:
    """Cross-entropy (natural log, float32 scalar) of softmax(hidden weight^T), summed over counted rows.

    Rows whose target is `ignore_index` cost nothing. `cpu` (C++; bfloat16 or float32; frozen head) holds the
    logits of at most 128 rows per thread, and its bits do not depend on the number of threads; `eager` is the
    plain-torch reference; `auto` takes what the committed table measured as faster.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit, or `impl` cannot run on them.
    """
    _check(hidden_ND, weight_VD, target_N)
    counted = target_N[target_N != ignore_index]
    num_valid = counted.numel()
    if num_valid and not (int(counted.min()) >= 0 and int(counted.max()) < weight_VD.shape[0]):
        raise ValueError(
            f"targets must lie in [0, {weight_VD.shape[0]}) or be {ignore_index}, "
            f"got {int(counted.min())}..{int(counted.max())}"
        )
    refusal = _refusal(hidden_ND, weight_VD)
    if impl == "auto":
        impl = _choose(hidden_ND, weight_VD, num_valid) if refusal is None else "eager"
    if impl == "eager":
        from luthier.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

        return LossSum(
            linear_cross_entropy_reference(hidden_ND, weight_VD, target_N, ignore_index), num_valid
        )
    if impl != "cpu":
        raise ValueError(f"impl must be auto, cpu or eager, got {impl!r}")
    if refusal is not None:
        raise ValueError(refusal)
    import torch

    from luthier.kernels.linear_cross_entropy.cpu import linear_cross_entropy_cpu

    need_grad = torch.is_grad_enabled() and hidden_ND.requires_grad
    loss_sum, _ = linear_cross_entropy_cpu(hidden_ND, weight_VD, target_N, ignore_index, need_grad)
    return LossSum(loss_sum, num_valid)


def _check(hidden_ND: "Tensor", weight_VD: "Tensor", target_N: "Tensor") -> None:
    import torch

    shapes = tuple(hidden_ND.shape), tuple(weight_VD.shape), tuple(target_N.shape)
    fits = [len(shape) for shape in shapes] == [2, 2, 1]
    if not fits or shapes[0][1] != shapes[1][1] or shapes[0][0] != shapes[2][0] or 0 in shapes[1]:
        raise ValueError(f"shapes must be hidden [N, D], weight [V, D], target [N], got {shapes}")
    if hidden_ND.dtype != weight_VD.dtype or not hidden_ND.is_floating_point():
        raise ValueError(
            f"hidden and weight must share a float dtype, got {hidden_ND.dtype}, {weight_VD.dtype}"
        )
    if target_N.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target_N.dtype}")
    if len({hidden_ND.device, weight_VD.device, target_N.device}) != 1:
        raise ValueError(
            f"tensors must share a device, got {hidden_ND.device}, {weight_VD.device}, {target_N.device}"
        )


def _refusal(hidden_ND: "Tensor", weight_VD: "Tensor") -> str | None:
    import torch

    if hidden_ND.device.type != "cpu":
        return f"impl 'cpu' needs tensors on the CPU, got {hidden_ND.device}"
    if hidden_ND.dtype not in (torch.bfloat16, torch.float32):
        return f"impl 'cpu' needs bfloat16 or float32, got {hidden_ND.dtype}"
    if weight_VD.requires_grad and torch.is_grad_enabled():
        return "impl 'cpu' needs a frozen head, got weight.requires_grad=True"
    return None


def _choose(hidden_ND: "Tensor", weight_VD: "Tensor", num_valid: int) -> Impl:
    from luthier.kernels.dispatch import current_isa

    dtype = str(hidden_ND.dtype).removeprefix("torch.")
    chosen = choose(key(current_isa(), dtype, num_valid, weight_VD.shape[0]))
    return "cpu" if chosen == "cpu" else "eager"
