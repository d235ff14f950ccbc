"""The measured table: read as committed, shown in the run record, eager with one word where nothing was measured."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch

from luthier import kernels
from luthier.kernels.dispatch import available_isas, current_isa, force_isa
from luthier.kernels.linear_cross_entropy import linear_cross_entropy
from luthier.kernels.linear_cross_entropy.table import TABLE_PATH, choose, entries, key, shape_class


def test_table_names_known_instruction_sets_dtypes_and_implementations() -> None:
    for name, implementation in json.loads(TABLE_PATH.read_text()).items():
        isa, dtype, _ = name.split("/")
        assert isa in {"plain", "avx2", "avx512_bf16"}
        assert dtype in {"bfloat16", "float32"}
        assert implementation in {"cpu", "eager"}


def test_table_digest_is_that_of_the_committed_file() -> None:
    assert kernels.table_digest() == hashlib.sha256(TABLE_PATH.read_bytes()).hexdigest()


def test_describe_shows_what_this_process_would_choose() -> None:
    described = kernels.describe()
    assert described["isa"] == current_isa()
    chosen = described["linear_cross_entropy"]
    assert isinstance(chosen, dict)
    assert chosen == {name: one for name, one in entries().items() if name.startswith(f"{current_isa()}/")}


def test_choose_says_once_that_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [choose("no-such-isa/bfloat16/x") for _ in range(3)] == ["eager"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "linear_cross_entropy has no measurement for no-such-isa/bfloat16/x: running eager"
    ]


@pytest.mark.parametrize("rows", [16, 256])
def test_auto_runs_what_the_table_says(rows: int) -> None:
    """The result of `auto` is, bit for bit, that of the implementation in the table."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 32, generator=generator)
    weight = torch.randn(9000, 32, generator=generator)
    target = torch.randint(9000, (rows,), generator=generator)
    chosen = choose(key(current_isa(), "float32", rows, 9000))
    forced = linear_cross_entropy(hidden, weight, target, impl=chosen)  # type: ignore[arg-type]
    assert torch.equal(linear_cross_entropy(hidden, weight, target).loss_sum, forced.loss_sum)


def test_shape_class_divides_by_rows_and_vocabulary() -> None:
    assert shape_class(127, 8191) == "few_rows-small_vocab"
    assert shape_class(128, 8192) == "many_rows-large_vocab"


def test_force_isa_refuses_what_the_processor_lacks() -> None:
    with pytest.raises(ValueError, match=r"got 'avx1024'"):
        force_isa("avx1024")  # type: ignore[arg-type]
    force_isa(available_isas()[0])
    assert current_isa() == available_isas()[0]
    force_isa(None)
    assert current_isa() == available_isas()[-1]
