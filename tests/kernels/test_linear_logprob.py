"""Log-probabilities and entropies of a linear head: outputs and gradients against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.kernels.dispatch import Isa
from luthier.kernels.linear_cross_entropy import BYTES_OF_LOGIT
from luthier.kernels.linear_cross_entropy.reference import head_logits
from luthier.kernels.linear_logprob import linear_logprob, reference
from luthier.kernels.linear_logprob.cpu import linear_logprob_op
from luthier.kernels.linear_logprob.reference import linear_logprob_reference


def problem(rows: int, dim: int, vocab: int, peak: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + dim)
    hidden = (torch.randn(rows, dim, generator=generator) * peak).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator) * 0.2
    target = torch.randint(0, vocab, (rows,), generator=generator)
    target[-1:] = vocab - 1
    return [hidden, weight, target]


def runner(softcap: float = 0.0) -> Callable[..., list[Tensor]]:
    def run(impl: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
        outputs = linear_logprob(hidden, weight, target, softcap=softcap, want_entropy=True, impl=impl)
        assert outputs.entropy is not None
        return [outputs.logprob, outputs.entropy]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "softcap"),
    [((0, 16, 100), 0.0), ((1, 64, 512), 0.0), ((7, 33, 20001), 5.0), ((129, 64, 777, 5.0), 0.0)],
)
def test_kernels_are_no_less_exact_than_eager(
    kernels: str,
    dtype: torch.dtype,
    shape: Any,
    softcap: float,
    exact_as_eager: Callable[..., None],
    rows_of: Callable[..., Any],
) -> None:
    exact_as_eager(runner(softcap), problem(*rows_of(kernels, shape)), dtype)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_eager_sums_logits_in_float32_where_it_is_asked_to(
    is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_chunked:
        monkeypatch.setattr(reference, "DEFAULT_BUDGET_BYTES", 3 * BYTES_OF_LOGIT * 300)
    hidden, weight, target = problem(9, 64, 300, peak=5.0)
    given = [hidden.detach().bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), target]
    exact = linear_logprob_reference(given[0].double(), given[1].double(), target, 0.0)[0]
    rounded, wide = (linear_logprob(*given, is_wide=one, impl="eager").logprob for one in (False, True))
    assert (rounded - exact).abs().max() > 1e-2
    assert (wide - exact).abs().max() < 1e-4
    wide.sum().backward()  # type: ignore[no-untyped-call]
    assert given[1].grad is not None
    assert given[1].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_trained_head_is_trained_by_the_kernels(
    isa: Isa, dtype: torch.dtype, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_chunked:
        monkeypatch.setattr(reference, "DEFAULT_BUDGET_BYTES", 3 * BYTES_OF_LOGIT * 300)
    hidden, weight, target = problem(9, 64, 300, peak=2.0)
    leaves = [one.detach().to(dtype).requires_grad_() for one in (hidden, weight)]
    exact = [one.detach().double().requires_grad_() for one in leaves]
    ours = linear_logprob(leaves[0], leaves[1], target, softcap=20.0, want_entropy=True, impl="cpu")
    theirs = linear_logprob_reference(exact[0], exact[1], target, 20.0)
    for found, wanted in zip(ours, theirs, strict=True):
        assert found is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        gradients = (
            torch.autograd.grad(found.sum(), leaves, retain_graph=True),
            torch.autograd.grad(wanted.sum(), exact, retain_graph=True),
        )
        for got, want in zip(*gradients, strict=True):
            assert got.dtype == dtype
            assert (got.double() - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("rows", [10, 200])
def test_cpu_bits_do_not_depend_on_threads(
    isa: Isa, rows: int, gradients: Callable[..., list[Tensor]], same_for_threads: Callable[..., None]
) -> None:
    same_for_threads(lambda: gradients(runner(), "cpu", problem(rows, 33, 40001), torch.bfloat16))


def test_each_output_has_its_own_gradient(isa: Isa) -> None:
    hidden, weight, target = problem(5, 16, 100)
    outputs = linear_logprob(hidden, weight, target, want_entropy=True, impl="cpu")
    references = linear_logprob_reference(hidden, weight, target, 0.0)
    for ours, theirs in zip(outputs, references, strict=True):
        assert ours is not None
        (got,) = torch.autograd.grad(ours.sum(), hidden, retain_graph=True)
        (want,) = torch.autograd.grad(theirs.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_entropy_is_computed_where_asked_for(isa: Isa) -> None:
    hidden, weight, target = (tensor.detach() for tensor in problem(5, 16, 100))
    for impl in ("cpu", "eager"):
        assert linear_logprob(hidden, weight, target, impl=impl).entropy is None


def test_eager_takes_a_frozen_head_in_chunks_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(50, 16, 999)
    want = runner(3.0)("eager", *inputs)
    grads = [torch.autograd.grad(one.sum(), inputs[0], retain_graph=True)[0] for one in want]
    seen: list[int] = []

    def logits_of(rows: Tensor, *rest: Any) -> Tensor:
        seen.append(len(rows))
        return head_logits(rows, *rest)

    monkeypatch.setattr(reference, "head_logits", logits_of)
    monkeypatch.setattr(reference, "DEFAULT_BUDGET_BYTES", 7 * 999 * BYTES_OF_LOGIT)
    for ours, theirs, grad in zip(runner(3.0)("eager", *inputs), want, grads, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), inputs[0], retain_graph=True)[0], grad)
    assert set(seen) == {7, 1}


def test_op_passes_opcheck() -> None:
    hidden, weight, target = problem(7, 16, 100)
    for want_entropy in (False, True):
        torch.library.opcheck(linear_logprob_op.op, (hidden, weight, target, 0.0, want_entropy, True))


def test_reference_gradient_is_its_derivative() -> None:
    hidden, weight, target = problem(4, 5, 11)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob_reference(h, w, target, 2.0),
        (hidden.detach().double().requires_grad_(), weight.double().requires_grad_()),
    )


def test_linear_logprob_refuses_wrong_inputs() -> None:
    hidden, weight, target = problem(7, 16, 100)
    with pytest.raises(ValueError, match=r"\[0, 100\), got"):
        linear_logprob(hidden, weight, target + 1)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        linear_logprob(hidden, weight, target[1:])
    with pytest.raises(ValueError, match="-1"):
        linear_logprob(hidden, weight, target, softcap=-1.0)
    with pytest.raises(ValueError, match="requires_grad=True"):
        linear_logprob(hidden, weight.requires_grad_(), target, impl="triton")
