"""The measured tables: which implementation of an operator `auto` takes."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from luthier.kernels.dispatch import current_isa

if TYPE_CHECKING:
    import torch

Impl = Literal["auto", "cpu", "triton", "eager"]

OPS = (
    "adamw_8bit",
    "attention_decode",
    "attention_varlen",
    "dequantise",
    "gated_activation",
    "grouped_lora_linear",
    "linear",
    "linear_cross_entropy",
    "linear_logprob",
    "lora_linear",
    "rms_norm",
    "rope",
)
"""Operators with a table, by the name of their package."""

_IMPLS = get_args(Impl)
_log = logging.getLogger(__name__)

_MANY_ELEMENTS = 48 * 2**20
_MOST_KEYS = 1024

_forced: Impl = "auto"
_apart: ContextVar[bool] = ContextVar("rows_apart", default=False)


def force_impl(impl: Impl) -> None:
    """Let `auto` mean `impl` in this process: eager everywhere, cpu or triton wherever it can run; auto goes back.

    Raises:
        ValueError: there is no such implementation.
    """
    global _forced  # noqa: PLW0603 - one choice per process, made by its configuration
    if impl not in _IMPLS:
        raise ValueError(f"impl must be one of {_IMPLS}, got {impl!r}")
    _forced = impl


def forced() -> Impl:
    """What `auto` means in this process, as `force_impl` says."""
    return _forced


@contextmanager
def rows_apart() -> Iterator[None]:
    """Let `auto` mean C++ on a processor, in this thread and for a block, wherever it can run and nothing is forced.

    There the bits of a row depend on no other row, which torch's products do not promise: rows may be computed
    together that must have the bits that they have alone.
    """
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def table_path(op: str) -> Path:
    """Where an operator's committed table stands."""
    return Path(__file__).parent / op / "table.json"


@functools.cache
def entries(op: str) -> dict[str, str]:
    """The committed table of an operator: `ISA or GPU architecture/dtype/shape class` -> cpu, triton or eager."""
    table: dict[str, str] = json.loads(table_path(op).read_text())
    return table


@functools.cache
def choose(op: str, table_key: str) -> str:
    """The measured best implementation; eager, with one log line, where nothing was measured."""
    if table_key not in entries(op):
        _log.warning("%s has no measurement for %s: running eager", op, table_key)
    return entries(op).get(table_key, "eager")


def kernels_of(impl: Impl, x: "torch.Tensor") -> Literal["cpu", "triton"]:
    """The kernels that could run for `impl` on this tensor: those asked for, else those of its device.

    Raises:
        ValueError: `impl` is unknown.
    """
    if impl not in _IMPLS:
        raise ValueError(f"impl must be one of {_IMPLS}, got {impl!r}")
    wanted = _forced if impl == "auto" else impl
    if wanted in ("auto", "eager"):
        return "triton" if x.device.type == "cuda" else "cpu"
    return "triton" if wanted == "triton" else "cpu"


def resolve(op: str, impl: Impl, refusal: str | None, x: "torch.Tensor", shape_class: str) -> str:
    """The implementation to run: cpu, triton or eager.

    Args:
        op: the operator's name.
        impl: what the caller asks for.
        refusal: why the kernels of `kernels_of(impl, x)` cannot run on these inputs, or None.
        x: the activations.
        shape_class: the inputs' class in the operator's table.

    Raises:
        ValueError: `impl` is cpu or triton, and cannot run.
    """
    if impl == "auto":
        if refusal is not None or _forced == "eager":
            return "eager"
        if _forced != "auto":
            return _forced
        if _apart.get() and x.device.type == "cpu":
            return "cpu"
        return choose(op, _key(_chip(x), x.dtype, shape_class))
    if impl != "eager" and refusal is not None:
        raise ValueError(refusal)
    return impl


def measured(op: str, x: "torch.Tensor", shape_class: str) -> str | None:
    """What the table has for a class of inputs; None, without a log line, where nothing was measured."""
    return entries(op).get(_key(_chip(x), x.dtype, shape_class))


@functools.lru_cache(maxsize=_MOST_KEYS)
def _key(chip: str, dtype: "torch.dtype", shape_class: str) -> str:
    """The entry of a class: every layer of a model asks for the same few, there and back, in every step.

    Only the name is kept. What it depends on is given to it, so that it holds whatever is forced meanwhile.
    """
    return f"{chip}/{str(dtype).removeprefix('torch.')}/{shape_class}"


def _chip(x: "torch.Tensor") -> str:
    """The first part of a table's key: the instruction set of C++, or a GPU's architecture."""
    if x.device.type == "cpu":
        return current_isa()
    from luthier.kernels.gpu import architecture

    return architecture(x.device)


def few_below(device_type: str, on_cpu: int) -> int:
    """Below how many rows they are few. On a GPU the call of a product takes longer than 1,024 rows of most models."""
    return 1024 if device_type == "cuda" else on_cpu


def row_class(rows: int, elements: int, device_type: str) -> str:
    """The class of a problem whose operator takes each row by itself: of few, the call is what takes time.

    On a GPU that depends on the elements of all rows.
    """
    is_few = elements < _MANY_ELEMENTS if device_type == "cuda" else rows < 64
    return "few_rows" if is_few else "many_rows"


def digest() -> str:
    """SHA-256 of all committed tables, for the record of a run."""
    hasher = hashlib.sha256()
    for op in OPS:
        hasher.update(table_path(op).read_bytes())
    return hasher.hexdigest()
