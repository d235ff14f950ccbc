"""How the tables of a processor are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import kernels
import pytest

from luthier.kernels import tables
from luthier.kernels.dispatch import Isa


def test_every_name_in_the_tables_says_what_holds_torch_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(kernels.TORCH_HELD) == get_args(Isa)
    monkeypatch.setattr(kernels, "available_isas", lambda: get_args(Isa))
    assert kernels.isas_here() == ["plain", "avx2", "avx512", "amx_bf16"]
    monkeypatch.setattr(kernels, "available_isas", lambda: get_args(Isa)[:-1])
    assert kernels.isas_here() == ["plain", "avx2", "avx512", "avx512_bf16"]


def test_entries_of_chips_that_were_not_measured_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {
        "avx2/float32/few_rows": "cpu",
        "plain/float32/few_rows": "cpu",
        "sm_90/bfloat16/few_rows": "triton",
    }
    for op in tables.OPS:
        (tmp_path / op).write_text(json.dumps(before))
    monkeypatch.setattr(kernels, "table_path", lambda op: tmp_path / op)
    measured = {"op": "rope", "isa": "avx2", "dtype": "float32"}
    kernels.write_tables(
        [
            measured | {"shape_class": "few_rows", "median_seconds": {"cpu": 2.0, "eager": 1.0}},
            measured | {"shape_class": "many_rows", "median_seconds": {"cpu": 1.0, "eager": 2.0}},
        ]
    )
    assert json.loads((tmp_path / "rope").read_text()) == {
        "avx2/float32/few_rows": "eager",
        "avx2/float32/many_rows": "cpu",
        "plain/float32/few_rows": "cpu",
        "sm_90/bfloat16/few_rows": "triton",
    }
    assert json.loads((tmp_path / "rms_norm").read_text()) == before
