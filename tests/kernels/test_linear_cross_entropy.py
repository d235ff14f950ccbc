"""Loss of a linear head: forward and gradients against float64, on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.linear_cross_entropy import (
    BYTES_OF_LOGIT,
    HeadUpdate,
    LossOptions,
    linear_cross_entropy,
    reference,
)
from luthier.kernels.linear_cross_entropy.cpu import linear_cross_entropy_op
from luthier.kernels.linear_cross_entropy.reference import (
    chunked_loss,
    head_logits,
    linear_cross_entropy_reference,
)


def problem(rows: int, dim: int, vocab: int, peak: float = 1.0) -> list[Tensor]:
    """Hidden states, head, targets (every third row ignored, the last target the last word), token weights."""
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    hidden = (torch.randn(rows, dim, generator=generator) * peak).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator) * 0.2
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[::3] = -100
    target[-1:] = vocab - 1
    return [hidden, weight, target, torch.rand(rows, generator=generator) + 0.5]


def runner(**options: Any) -> Callable[..., list[Tensor]]:
    weighted = options.pop("weighted", False)

    def run(impl: Any, hidden: Tensor, weight: Tensor, target: Tensor, token_weight: Tensor) -> list[Tensor]:
        weights = token_weight if weighted else None
        settings = LossOptions(**options)
        return [
            linear_cross_entropy(
                hidden, weight, target, token_weight_N=weights, options=settings, impl=impl
            ).loss_sum
        ]

    return run


def in_some_orders(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Eager with the contraction in the order in which its error is the largest of a few: one may be lucky."""

    def worst(impl: str, hidden: Tensor, weight: Tensor, *rest: Tensor) -> list[Tensor]:
        exact = run(impl, hidden.double(), weight.double(), *rest)[0]
        orders = [
            torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in range(8)
        ]
        results = [run(impl, hidden[:, order], weight[:, order], *rest)[0] for order in orders]
        return [max(results, key=lambda loss: (loss.double() - exact).abs().item())]

    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((0, 16, 100, 1.0), {}),
        ((1, 64, 512, 1.0), {}),
        ((7, 33, 777, 20.0), {}),
        ((129, 64, 512, 1.0), {}),
        ((129, 33, 777, 1.0), {"label_smoothing": 0.1, "z_loss": 1e-2, "weighted": True}),
        # Segments of 16384 words in chunks of 256, and a part of each.
        ((50, 65, 33069, 1.0), {"softcap": 30.0}),
        ((100, 64, 16685, 3.0), {"softcap": 10.0, "label_smoothing": 0.2, "z_loss": 1e-3}),
    ],
)
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, float],
    options: dict[str, Any],
    exact_as_eager: Callable[..., None],
    rows_of: Callable[..., Any],
) -> None:
    run = runner(**options)
    exact_as_eager(run, problem(*rows_of(kernels, shape)), dtype, eager=in_some_orders(run))


def test_padded_vocabulary_is_never_a_word(isa: Isa) -> None:
    hidden, weight, target, _ = problem(20, 16, 300)
    target = target.clamp(max=250)
    weight[251:] = 100.0
    want = linear_cross_entropy(hidden, weight[:251], target, impl="cpu").loss_sum
    options = LossOptions(vocab_valid=251)
    for impl in ("cpu", "eager"):
        got = linear_cross_entropy(hidden, weight, target, options=options, impl=impl)
        torch.testing.assert_close(got.loss_sum, want)


def test_cpu_of_ignored_rows_is_zero(isa: Isa) -> None:
    hidden, weight, target, _ = problem(9, 16, 100)
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(target, -100), impl="cpu")
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss == 0
    assert count == 0
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [10, 200])
def test_cpu_bits_depend_neither_on_threads_nor_on_other_rows(
    isa: Isa,
    dtype: torch.dtype,
    rows: int,
    gradients: Callable[..., list[Tensor]],
    same_for_threads: Callable[..., None],
) -> None:
    hidden, weight, target, token_weight = problem(rows, 33, 40001)
    run = runner(label_smoothing=0.1)
    same_for_threads(lambda: gradients(run, "cpu", [hidden, weight, target, token_weight], dtype))
    # The gradient of a row is that of its own loss, summed with whatever others.
    _, whole = gradients(run, "cpu", [hidden, weight, target, token_weight], dtype)
    part = hidden.detach()[3:9].requires_grad_()
    _, some = gradients(run, "cpu", [part, weight, target[3:9], token_weight], dtype)
    assert torch.equal(whole[3:9], some)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cpu_propagates_non_finite_rows_alone(isa: Isa, value: float) -> None:
    hidden, weight, target, _ = problem(20, 16, 300)
    with torch.no_grad():
        hidden[4, 3] = value
    loss = linear_cross_entropy(hidden, weight, target, impl="cpu").loss_sum
    (grad,) = torch.autograd.grad(loss, hidden)
    assert not loss.isfinite()
    assert grad[4].isnan().any()
    assert grad[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_takes_strided_and_misaligned_inputs(isa: Isa, dtype: torch.dtype) -> None:
    hidden, weight, target, _ = (tensor.detach() for tensor in problem(20, 32, 300))
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    want = linear_cross_entropy(hidden, weight, target, impl="cpu").loss_sum
    strided = torch.empty(300, 37, dtype=dtype)[:, 1:33].copy_(weight)
    for hidden_view, weight_view in [(hidden.T.contiguous().T, strided), (hidden, weight.T.clone().T)]:
        assert torch.equal(linear_cross_entropy(hidden_view, weight_view, target, impl="cpu").loss_sum, want)


def test_op_passes_opcheck() -> None:
    hidden, weight, target, token_weight = problem(7, 16, 100)
    none = token_weight.new_empty(0).double()
    # No dynamic shapes: how many rows count is known when they are.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for inputs, weights in [
        (hidden, none),
        (hidden.detach().T.contiguous().T.requires_grad_(), token_weight.double()),
    ]:
        arguments = (inputs, weight, target, weights, -100, [0.0, 0.1, 0.0], True)
        torch.library.opcheck(linear_cross_entropy_op.op, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=3.0)]
)
def test_reference_gradient_is_its_derivative(options: LossOptions) -> None:
    hidden, weight, target, token_weight = problem(4, 5, 11)
    update = HeadUpdate(
        torch.randn(2, 5).double().requires_grad_(), torch.randn(11, 2).double().requires_grad_(), 0.5
    )
    assert torch.autograd.gradcheck(
        lambda h, w, a, b: linear_cross_entropy_reference(
            h, w, target, token_weight.double(), HeadUpdate(a, b, 0.5), options
        ),
        (hidden.detach().double().requires_grad_(), weight.double().requires_grad_(), update.a, update.b),
    )


@pytest.mark.parametrize("budget", [1, 16 * 999 * 10, 2**30])
def test_trained_head_with_update_goes_in_chunks_within_the_budget(budget: int) -> None:
    hidden, weight, target, token_weight = (tensor.detach().double() for tensor in problem(77, 16, 999))
    factors = [torch.randn(4, 16).double(), torch.randn(999, 4).double()]
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, *factors)]
    options = LossOptions(budget_bytes=budget, softcap=20.0, z_loss=1e-3)
    update = HeadUpdate(leaves[2], leaves[3], 0.5)
    inputs = (leaves[0], leaves[1], target.long(), token_weight, update, options)
    want = linear_cross_entropy_reference(*inputs)
    got = chunked_loss(*inputs)
    torch.testing.assert_close(got, want)
    for first, second in zip(
        torch.autograd.grad(got * 0.5, leaves), torch.autograd.grad(want * 0.5, leaves), strict=True
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("rows_at_a_time", "most"), [(7, 7), (100, 51)])
def test_eager_keeps_the_logits_of_a_frozen_head_to_the_budget(
    monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int, most: int
) -> None:
    hidden, weight, target, _ = problem(76, 16, 999)
    (want,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, impl="eager").loss_sum, hidden)
    seen: list[int] = []

    def logits_of(rows: Tensor, *rest: Any) -> Tensor:
        seen.append(len(rows))
        return head_logits(rows, *rest)

    monkeypatch.setattr(reference, "head_logits", logits_of)
    options = LossOptions(budget_bytes=rows_at_a_time * 999 * BYTES_OF_LOGIT)
    loss, num_valid = linear_cross_entropy(hidden, weight, target, options=options, impl="eager")
    assert num_valid == sum(seen) == 51
    assert max(seen) == most
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_a_time", [7, 1000])
def test_trained_head_is_trained_by_the_kernels(isa: Isa, dtype: torch.dtype, rows_at_a_time: int) -> None:
    hidden, weight, target, token_weight = problem(77, 16, 999)
    rounded = [hidden.detach().to(dtype), weight.to(dtype)]
    leaves = [one.requires_grad_() for one in rounded]
    exact = [one.detach().double().requires_grad_() for one in rounded]
    options = LossOptions(
        budget_bytes=rows_at_a_time * 999 * BYTES_OF_LOGIT,
        softcap=20.0,
        z_loss=1e-3,
        label_smoothing=0.1,
        vocab_valid=990,
    )
    target = target.clamp(max=989)
    runs = {
        "cpu": linear_cross_entropy(
            leaves[0], leaves[1], target, token_weight_N=token_weight, options=options, impl="cpu"
        ),
        "exact": linear_cross_entropy(
            exact[0], exact[1], target, token_weight_N=token_weight, options=options, impl="eager"
        ),
    }
    of_logits = 2**-20 if dtype == torch.float32 else 2**-14
    torch.testing.assert_close(runs["cpu"].loss_sum.double(), runs["exact"].loss_sum, rtol=of_logits, atol=0)
    grads = torch.autograd.grad(runs["cpu"].loss_sum * 0.5, leaves)
    for ours, theirs in zip(grads, torch.autograd.grad(runs["exact"].loss_sum * 0.5, exact), strict=True):
        assert ours.dtype == dtype
        far = (ours.double() - theirs).norm() / theirs.norm()
        assert far < (1e-5 if dtype == torch.float32 else 5e-3)
    assert grads[1][990:].abs().max() == 0


def test_head_of_a_gpu_is_trained_by_eager() -> None:
    hidden, weight, target, _ = problem(7, 16, 100)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="requires_grad=True"):
        linear_cross_entropy(hidden, weight, target, impl="triton")


def test_linear_cross_entropy_refuses_wrong_inputs() -> None:
    hidden, weight, target, token_weight = problem(7, 16, 100)
    with pytest.raises(ValueError, match="float64"):
        linear_cross_entropy(hidden.double(), weight.double(), target, impl="cpu")
    with pytest.raises(ValueError, match=r"\(100, 15\)"):
        linear_cross_entropy(hidden, weight[:, 1:], target)
    with pytest.raises(ValueError, match="int32"):
        linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match="100"):
        linear_cross_entropy(hidden, weight, target + 1)
    with pytest.raises(ValueError, match="fast"):
        linear_cross_entropy(hidden, weight, target, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(7,\), got \(6,\)"):
        linear_cross_entropy(hidden, weight, target, token_weight_N=token_weight[1:])
    update = HeadUpdate(torch.zeros(2, 16), torch.zeros(99, 2), 1.0)
    with pytest.raises(ValueError, match=r"b \[100, R\], got \(\(2, 16\), \(99, 2\)\)"):
        linear_cross_entropy(hidden, weight, target, update=update)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (LossOptions(label_smoothing=1.0), r"\[0, 1\), got 1.0"),
        (LossOptions(z_loss=-1.0), "z_loss=-1.0"),
        (LossOptions(softcap=-1.0), "softcap=-1.0"),
        (LossOptions(vocab_valid=101), r"0..100, got 101"),
        (LossOptions(budget_bytes=0), "budget_bytes=0"),
    ],
)
def test_linear_cross_entropy_refuses_wrong_options(options: LossOptions, said: str) -> None:
    hidden, weight, target, _ = problem(7, 16, 100)
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(hidden, weight, target, options=options)


@pytest.mark.parametrize(
    "order", ["import torch, luthier.kernels._core", "import luthier.kernels._core, torch"]
)
def test_process_maps_one_openmp_runtime(order: str) -> None:
    script = (
        f"{order}\nfrom luthier.kernels.gated_activation import swiglu\n"
        "swiglu(torch.ones(99, 99), torch.ones(99, 99), impl='cpu') @ torch.ones(99, 99)\n"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}) == 1
