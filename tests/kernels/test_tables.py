"""The measured tables: read as committed, shown in the run record, eager with one word where nothing was measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from luthier import kernels
from luthier.kernels import grouped_lora_linear, linear_cross_entropy, lora_linear, tables
from luthier.kernels.dispatch import available_isas, current_isa, force_isa
from luthier.kernels.gated_activation import swiglu
from luthier.kernels.rope import rope
from luthier.kernels.tables import (
    OPS,
    choose,
    entries,
    force_impl,
    measured,
    resolve,
    row_class,
    table_path,
)


@pytest.fixture
def forced() -> Iterator[None]:
    yield
    force_impl("auto")


@pytest.mark.parametrize("op", OPS)
def test_table_names_known_chips_dtypes_and_implementations(op: str) -> None:
    assert entries(op)
    for name, implementation in entries(op).items():
        chip, dtype, shape_class = name.split("/")
        assert chip in {"plain", "avx2", "avx512", "avx512_bf16", "amx_bf16", "sm_90"}
        assert dtype in {"bfloat16", "float32"}
        assert shape_class
        assert implementation in {"triton" if chip == "sm_90" else "cpu", "eager"}


def test_on_a_gpu_elements_make_rows_many_and_multiplications_make_a_product_vast() -> None:
    assert [row_class(rows, 8 * rows, "cpu") for rows in (0, 63, 64)] == ["few_rows", "few_rows", "many_rows"]
    assert row_class(16384, 16384 * 576, "cuda") == "few_rows"
    assert row_class(12288, 12288 * 4096, "cuda") == "many_rows"
    products = 4096 * 4096 * 14336
    assert lora_linear.gpu_shape_class(4096, 16, 1, products) == "vast_rows-small_rank-one"
    assert lora_linear.gpu_shape_class(4096, 64, 2, 2**37 - 1) == "many_rows-large_rank-several"
    assert lora_linear.gpu_shape_class(1023, 16, 1, 1) == "some_rows-small_rank-one"
    assert grouped_lora_linear.shape_class(1000, 4, "cuda") == "few_rows-several"
    assert grouped_lora_linear.shape_class(1000, 4) == "many_rows-several"
    assert linear_cross_entropy.shape_class(1000, 9000, "cuda") == "few_rows-large_vocab"
    assert linear_cross_entropy.shape_class(1000, 9000) == "many_rows-large_vocab"


def test_every_operator_has_the_same_files() -> None:
    root = Path(kernels.__file__).parent
    found = {path.parent.name for path in root.glob("*/__init__.py")}
    assert found == set(OPS)
    for op in OPS:
        assert {path.name for path in (root / op).iterdir()} >= {"reference.py", "cpu.py", "table.json"}


def test_table_digest_is_that_of_the_committed_files() -> None:
    hasher = hashlib.sha256()
    for op in sorted(OPS):
        hasher.update(table_path(op).read_bytes())
    assert kernels.table_digest() == hasher.hexdigest()


def test_describe_shows_what_a_gpu_would_choose() -> None:
    described = kernels.describe("sm_90")
    assert described.pop("isa") == current_isa()
    assert described["rms_norm/bfloat16/few_rows"] == "triton"
    assert set(described.values()) == {"triton", "eager"}
    assert kernels.describe("sm_1") == {"isa": current_isa()}


def test_describe_shows_what_this_process_would_choose() -> None:
    described = kernels.describe()
    assert described.pop("isa") == current_isa()
    assert described == {
        f"{op}/{name.partition('/')[2]}": chosen
        for op in OPS
        for name, chosen in entries(op).items()
        if name.startswith(f"{current_isa()}/")
    }


def test_choose_says_once_that_nothing_was_measured(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # import-linter, which other tests run, disables every logger that there is.
    monkeypatch.setattr(tables._log, "disabled", False)
    choose.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [choose("rope", "no-such-isa/bfloat16/x") for _ in range(3)] == ["eager"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "rope has no measurement for no-such-isa/bfloat16/x: running eager"
    ]


@pytest.mark.usefixtures("forced")
def test_force_impl_is_what_auto_means_where_it_can_run() -> None:
    gate, up = torch.randn(2, 40, 33).bfloat16()
    ours, eager = (swiglu(gate, up, impl=impl) for impl in ("cpu", "eager"))
    assert not torch.equal(ours, eager)
    force_impl("cpu")
    assert torch.equal(swiglu(gate, up), ours)
    assert swiglu(gate.double(), up.double()).dtype == torch.float64
    force_impl("eager")
    assert torch.equal(swiglu(gate, up), eager)
    with pytest.raises(ValueError, match="fast"):
        force_impl("fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("op", OPS)
def test_instruction_sets_of_one_family_have_entries_of_the_same_classes(op: str) -> None:
    of_chip: dict[str, set[str]] = {}
    for name in entries(op):
        chip, _, kind = name.partition("/")
        of_chip.setdefault(chip, set()).add(kind)
    # An operator that was measured on neither runs eager on both. Classes that came since are measured on tiles alone.
    assert of_chip.get("amx_bf16", set()) >= of_chip.get("avx512_bf16", set())


def test_an_entry_s_name_is_made_once_for_all_layers_and_steps() -> None:
    """Each projection, there and back, of each layer asks for the same few classes, in every step."""
    layers = [torch.randn(24, 16).bfloat16().requires_grad_(), torch.ones(24, 16).bfloat16()]
    tables._key.cache_clear()
    for _ in range(3):
        for rows in layers:
            gate, up = rows.chunk(2, dim=1)
            swiglu(rope(gate[:, None], *torch.ones(2, 24, 8).bfloat16())[:, 0], up).sum()
    asked = tables._key.cache_info()
    assert asked.hits + asked.misses == 12
    assert asked.misses == 1, "the few rows of both operators are one class"
    assert asked.maxsize is not None, "classes are few, but nobody promises it"


def test_what_the_table_has_for_another_instruction_set_is_found_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slowest, best = available_isas()[0], available_isas()[-1]
    assert slowest != best, "every processor with our kernels' tests has more than the plain one"
    table = {f"{slowest}/float32/few_rows": "eager", f"{best}/float32/few_rows": "cpu"}
    monkeypatch.setattr(tables, "entries", lambda op: table)
    choose.cache_clear()
    x = torch.ones(2, 2)
    found = []
    try:
        for isa in (best, slowest, best):
            force_isa(isa)
            found.append((resolve("rope", "auto", None, x, "few_rows"), measured("rope", x, "few_rows")))
    finally:
        force_isa(None)
        choose.cache_clear()
    assert found == [("cpu", "cpu"), ("eager", "eager"), ("cpu", "cpu")]
    assert measured("rope", x.bfloat16(), "few_rows") is None


def test_force_isa_refuses_what_the_processor_lacks() -> None:
    with pytest.raises(ValueError, match=r"got 'avx1024'"):
        force_isa("avx1024")  # type: ignore[arg-type]
    force_isa(available_isas()[0])
    assert current_isa() == available_isas()[0]
    force_isa(None)
    assert current_isa() == available_isas()[-1]
