"""Attention by libraries on a GPU: which one is taken, how it is called, and, on a device, what it computes.

Without a device the libraries are made up; FlexAttention is in `test_attention_flex.py`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from luthier.kernels.attention_varlen import attention_varlen, gpu, implementation, reference
from luthier.kernels.attention_varlen.reference import attention_varlen_reference
from luthier.kernels.dispatch import force_isa
from luthier.kernels.tables import Impl, force_impl

CPU = torch.device("cpu")
INPUTS = gpu.Inputs(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=128)
LIBRARIES = [backend for backend in gpu.BACKENDS if backend.name != "eager"]
CASES: list[tuple[list[int], tuple[int, int, int], dict[str, Any]]] = [
    ([0, 5, 300, 300, 437], (4, 2, 64), {}),
    ([0, 0, 130, 1100], (6, 2, 128), {"window": 50}),
    ([0, 70, 400], (4, 4, 80), {"scale": 0.3}),
    ([0, 1, 2, 130], (3, 1, 96), {"window": 1}),
    ([0, 7], (4, 2, 32), {}),
    ([0, 65, 200], (4, 2, 256), {"softcap": 5.0}),
    ([0, 300, 700], (4, 2, 128), {"softcap": 3.0, "window": 130, "scale": 0.2}),
]
"""(boundaries, (query heads, key heads, head size), options)."""


def heads(bounds: list[int], shape: tuple[int, int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads, size = shape
    return [
        torch.randn(bounds[-1], count, size, generator=generator).requires_grad_()
        for count in (query_heads, key_heads, key_heads)
    ]


def options_of(given: dict[str, Any], size: int) -> tuple[float, float, int]:
    return given.get("scale", size**-0.5), given.get("softcap", 0.0), given.get("window", 0)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes up what is installed beside a GPU of compute capability 9.0."""

    def choose(*names: str) -> None:
        here = "flash-attn" in names
        monkeypatch.setattr(gpu, "flash_attn_function", lambda: len if here else "is not installed")
        monkeypatch.setattr(gpu, "has_torch_flash", lambda: "torch varlen" in names)
        monkeypatch.setattr(gpu, "has_triton", lambda: "FlexAttention" in names)
        monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))

    return choose


@pytest.fixture
def forced() -> Iterator[Callable[[Impl], None]]:
    yield force_impl
    force_impl("auto")


@pytest.mark.parametrize(
    ("installed", "changes", "name"),
    [
        (["flash-attn", "torch varlen", "FlexAttention"], {}, "flash-attn"),
        (["flash-attn"], {"softcap": 30.0}, "flash-attn"),
        (["torch varlen", "FlexAttention"], {}, "torch varlen"),
        (["torch varlen", "FlexAttention"], {"softcap": 30.0}, "FlexAttention"),
        (["torch varlen", "FlexAttention"], {"head_dim": 20}, "FlexAttention"),
        (["FlexAttention"], {}, "FlexAttention"),
        (["torch varlen"], {"softcap": 30.0}, "eager"),
        ([], {}, "eager"),
        (["flash-attn", "torch varlen", "FlexAttention"], {"dtype": torch.float32}, "eager"),
    ],
)
def test_backend_for_takes_the_first_that_can_run(
    installed: list[str], changes: dict[str, Any], name: str, install: Callable[..., None]
) -> None:
    install(*installed)
    assert gpu.backend_for(replace(INPUTS, **changes)).name == name


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash-attn", {}, "flash-attn is not installed"),
        ("flash-attn", {"head_dim": 264}, "at most 256, got 264"),
        ("torch varlen", {}, "not in this build of torch"),
        ("torch varlen", {"head_dim": 36}, "multiple of 8, at most 256, got 36"),
        ("torch varlen", {"softcap": 2.5}, "no capped scores, got softcap 2.5"),
        ("torch varlen", {"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
        ("FlexAttention", {}, "package triton"),
        ("FlexAttention", {"head_dim": 8}, "at least 16, got 8"),
        ("FlexAttention", {"device": CPU}, "on a GPU, got cpu"),
        ("fastest", {}, "'torch varlen', 'FlexAttention', 'eager'.* got 'fastest'"),
    ],
)
def test_backend_for_says_why_the_one_asked_for_cannot_run(
    name: str, changes: dict[str, Any], reason: str, install: Callable[..., None]
) -> None:
    install()
    with pytest.raises(ValueError, match=reason):
        gpu.backend_for(replace(INPUTS, **changes), name)


def test_backend_for_takes_no_library_on_chips_where_none_was_tried(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install("flash-attn", "torch varlen", "FlexAttention")
    monkeypatch.setattr(gpu, "capability", lambda device: (7, 5))
    monkeypatch.setattr(gpu._log, "disabled", False)  # import-linter, which other tests run, disables loggers
    gpu._say_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert [gpu.backend_for(INPUTS).name for _ in range(3)] == ["eager"] * 3
    (said,) = caplog.messages
    assert said.startswith(
        "attention_varlen runs eager, sequence by sequence: flash-attn needs compute capability 8.0"
    )
    with pytest.raises(ValueError, match=r"8\.0, got 7\.5"):
        gpu.backend_for(INPUTS, "FlexAttention")
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="ROCm"):
        gpu.backend_for(INPUTS, "flash-attn")


@pytest.mark.parametrize(
    ("impl", "name"), [("eager", "eager"), ("triton", "torch varlen"), ("cpu", "torch varlen")]
)
def test_force_impl_eager_turns_the_libraries_off(
    impl: Impl, name: str, install: Callable[..., None], forced: Callable[[Impl], None]
) -> None:
    install("torch varlen")
    forced(impl)
    assert gpu.backend_for(INPUTS).name == name
    assert gpu.backend_for(INPUTS, "torch varlen").name == "torch varlen"


told_deterministic: list[bool] = []
"""What the made-up flash-attn was told, call by call."""


def flash_attn_varlen_func(  # noqa: PLR0917
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """With the arguments of flash-attn 2.8; computed by the reference."""
    told_deterministic.append(deterministic)
    assert causal
    assert dropout_p == 0
    assert softmax_scale is not None
    assert window_size[1] == 0
    assert cu_seqlens_q is cu_seqlens_k
    assert cu_seqlens_q.dtype == torch.int32
    assert (cu_seqlens_q.diff() > 0).all()
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert [tensor.stride(2) for tensor in (q, k, v)] == [1, 1, 1]
    window = window_size[0] + 1
    return attention_varlen_reference(q, k, v, cu_seqlens_q.tolist(), softmax_scale, softcap, window)


def torch_varlen_attn(*arguments: Any, **named: Any) -> Tensor:
    """With the arguments that this torch has; computed by the reference."""
    given = inspect.signature(varlen.varlen_attn).bind(*arguments, **named).arguments
    assert given["enable_gqa"]
    q, k, v, bounds = (given[name] for name in ("query", "key", "value", "cu_seq_q"))
    sizes = {"cu_seqlens_q": bounds, "cu_seqlens_k": given["cu_seq_k"]}
    sizes |= {"max_seqlen_q": given["max_q"], "max_seqlen_k": given["max_k"]}
    window_size = given["window_size"]
    return flash_attn_varlen_func(
        q, k, v, **sizes, softmax_scale=given["scale"], causal=True, window_size=window_size
    )


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Made-up flash-attn and `varlen_attn`, which check how they are called."""
    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __version__="2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    gpu.flash_attn_function.cache_clear()
    signature = inspect.signature(varlen.varlen_attn)
    torch_varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", torch_varlen_attn)
    yield
    gpu.flash_attn_function.cache_clear()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("bounds", "shape", "given"), CASES)
@pytest.mark.parametrize("name", ["flash-attn", "torch varlen"])
def test_libraries_are_called_with_what_they_take(
    name: str, bounds: list[int], shape: tuple[int, int, int], given: dict[str, Any]
) -> None:
    options = options_of(given, shape[2])
    if name == "torch varlen" and options[1]:
        options = (options[0], 0.0, options[2])
    attend = next(backend.attend for backend in gpu.BACKENDS if backend.name == name)
    query, key, value = (tensor.detach() for tensor in heads(bounds, shape))
    askew = value.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    want = attention_varlen_reference(query, key, value, bounds, *options)
    torch.testing.assert_close(attend(query, key, askew, bounds, *options), want)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("wanted", [True, False])
def test_flash_attn_is_told_to_be_deterministic_where_torch_is(
    *, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a GPU is recorded as BITWISE for it."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    attend = next(backend.attend for backend in gpu.BACKENDS if backend.name == "flash-attn")
    query, key, value = (tensor.detach() for tensor in heads([0, 5], (4, 2, 64)))
    told_deterministic.clear()
    attend(query, key, value, [0, 5], *options_of({}, 64))
    assert told_deterministic == [wanted]


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "is not installed"),
        (SimpleNamespace(__version__="4.0"), "2.6 or a later 2.x, got 4.0"),
        (SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: q, __version__="2.5"), "got 2.5"),
    ],
)
def test_flash_attn_function_says_why_there_is_none(
    package: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found = gpu.flash_attn_function.__wrapped__()
    assert isinstance(found, str)
    assert reason in found


def test_flash_attn_function_of_a_broken_package_says_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = gpu.flash_attn_function.__wrapped__()
    assert found == "cannot be imported: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(
    ("impl", "want"),
    [
        ("auto", ["flash-attn", "reference"]),
        ("eager", ["reference", "reference"]),
    ],
)
def test_attention_varlen_takes_a_library_for_tokens_on_a_gpu(
    impl: Impl, want: list[str], install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flash-attn")
    ran: list[str] = []

    def recording(name: str) -> gpu.Attend:
        def attend(query_THD: Tensor, *_: Any) -> Tensor:
            ran.append(name)
            return query_THD

        return attend

    backends = (replace(backend, attend=recording(backend.name)) for backend in gpu.BACKENDS)
    monkeypatch.setattr(gpu, "BACKENDS", tuple(backends))
    monkeypatch.setattr(reference, "attention_varlen_reference", recording("reference"))
    for bounds in ([0, 4, 9], [0, 0]):
        query, key, value = fakes_on_gpu(bounds[-1])
        attention_varlen(query, key, value, bounds, impl=impl)
    assert ran == want


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_attention_varlen_refuses_other_kernels_on_a_gpu(impl: Impl) -> None:
    query, key, value = fakes_on_gpu(9)
    with pytest.raises(ValueError, match=f"impl '{impl}'"):
        attention_varlen(query, key, value, [0, 9], impl=impl)


def fakes_on_gpu(num_tokens: int) -> list[Tensor]:
    """Query, key and value without memory, which say that they are on a GPU, as there may be none."""
    with FakeTensorMode():
        return [torch.empty(num_tokens, count, 16, dtype=torch.float16, device="cuda") for count in (4, 2, 2)]


def test_implementation_names_what_runs(install: Callable[..., None], forced: Callable[[Impl], None]) -> None:
    force_isa("plain")
    try:
        assert implementation(CPU, torch.bfloat16, 64) == "C++"
        assert implementation(CPU, torch.float32, 64) == "eager"
        forced("eager")
        assert implementation(CPU, torch.bfloat16, 64) == "eager"
    finally:
        force_isa(None)
        force_impl("auto")
    install("torch varlen", "FlexAttention")
    assert implementation(INPUTS.device, torch.bfloat16, 64) == "torch varlen"
    assert implementation(INPUTS.device, torch.bfloat16, 256, softcap=50.0) == "FlexAttention"


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    skipping = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
    marked: Callable[..., Any] = pytest.mark.gpu(skipping(function))
    return marked


def available(backend: gpu.Backend, size: int, softcap: float = 0.0) -> None:
    """Skip where the device's machine lacks the library, or it has no such thing."""
    inputs = gpu.Inputs(device=torch.device("cuda", 0), dtype=torch.bfloat16, head_dim=size, softcap=softcap)
    if reason := backend.refuse(inputs):
        pytest.skip(f"{backend.name} {reason}")


@on_device
@pytest.mark.parametrize(("bounds", "shape", "given"), CASES)
@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda backend: backend.name)
def test_libraries_are_no_less_exact_than_eager(
    backend: gpu.Backend,
    bounds: list[int],
    shape: tuple[int, int, int],
    given: dict[str, Any],
    gradients: Callable[..., list[Tensor]],
) -> None:
    options = options_of(given, shape[2])
    available(backend, shape[2], options[1])
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in heads(bounds, shape)]

    def run(name: str, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        attend = backend.attend if name == backend.name else attention_varlen_reference
        return [attend(query, key, value, bounds, *options)]

    exact = gradients(run, "eager", inputs, torch.float64)
    ours = gradients(run, backend.name, inputs, torch.bfloat16, "cuda")
    theirs = gradients(run, "eager", inputs, torch.bfloat16, "cuda")
    # Where a query sees itself alone, its gradient is zero: what is left of its terms is small against other gradients.
    scale = max(want.abs().max() for want in exact)
    for index, (want, got, other) in enumerate(zip(exact, ours, theirs, strict=True)):
        assert got.shape == want.shape
        bound = 2 * (other.double() - want).norm() + torch.finfo(torch.bfloat16).eps * scale
        error = (got.double() - want).norm()
        assert error <= bound, f"{backend.name}: output {index} is {error:.3g} off, allowed are {bound:.3g}"


@on_device
@pytest.mark.parametrize("backend", LIBRARIES, ids=lambda backend: backend.name)
def test_libraries_take_views_and_training_after_inference(backend: gpu.Backend) -> None:
    bounds, size = [0, 33, 190], 64
    available(backend, size)
    joined = torch.randn(190, 8, size, device="cuda").bfloat16()
    sizes, options = [4, 2, 2], (bounds, 0.125, 0.0, 0)
    with torch.inference_mode():
        query, key, value = (part.contiguous() for part in torch.split(joined, sizes, dim=1))
        whole = backend.attend(query, key, value, *options)
    learnt = joined.clone().requires_grad_()
    query, key, value = torch.split(learnt, sizes, dim=1)
    output = backend.attend(query, key, value, *options)
    torch.testing.assert_close(output, whole)
    (grad,) = torch.autograd.grad(output.float().sum(), learnt)
    assert grad.isfinite().all()


@on_device
def test_auto_runs_what_implementation_names() -> None:
    bounds, size = [0, 33, 190], 64
    query, key, value = (tensor.detach().bfloat16().cuda() for tensor in heads(bounds, (4, 2, size)))
    name = implementation(query.device, query.dtype, size)
    backend = next(one for one in gpu.BACKENDS if one.name == name)
    want = backend.attend(query, key, value, bounds, size**-0.5, 0.0, 0)
    assert torch.equal(attention_varlen(query, key, value, bounds), want)
    wide = [tensor.float() for tensor in (query, key, value)]
    eager = attention_varlen(wide[0], wide[1], wide[2], bounds, impl="eager")
    assert torch.equal(attention_varlen(wide[0], wide[1], wide[2], bounds), eager)
    assert attention_varlen(query[:0], key[:0], value[:0], [0, 0]).shape == (0, 4, size)
