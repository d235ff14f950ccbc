"""How the tables of a GPU are decided and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_tables
import pytest

from luthier.kernels import tables

pytest.importorskip("triton")


def row(table: str, key: str, ratio: float | None, eager: str = "timed") -> gpu_tables.Row:
    return {"table": table, "key": key, "ratio": ratio, "outcomes": {"eager": {"status": eager}}}


def test_ours_is_taken_only_where_it_won_on_every_shape_of_a_class() -> None:
    found = gpu_tables.choices(
        [
            row("rope", "bfloat16/many_rows", 0.5),
            row("rope", "bfloat16/many_rows", 0.9),
            row("rope", "bfloat16/few_rows", 0.99),  # a tie
            row("rms_norm", "float32/many_rows", 1.5),
            row("rms_norm", "float32/many_rows", 0.1),
            row("rms_norm", "bfloat16/many_rows", 0.1),
            row("rms_norm", "bfloat16/many_rows", None),  # ours is wrong, or failed
            row("rope", "bfloat16/many_rows", None, eager="failed"),  # too large for the device
            row("rope", "bfloat16/vast", None, eager="failed"),
        ]
    )
    assert found == {
        "rope": {"bfloat16/many_rows": "triton", "bfloat16/few_rows": "eager"},
        "rms_norm": {"float32/many_rows": "eager", "bfloat16/many_rows": "eager"},
    }


def test_entries_of_other_chips_and_undecided_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"avx2/float32/few_rows": "cpu", "sm_90/bfloat16/few_rows": "triton"}))
    monkeypatch.setattr(tables, "table_path", lambda op: path)
    gpu_tables.write_tables({"rope": {"bfloat16/many_rows": "triton"}}, "sm_90")
    assert json.loads(path.read_text()) == {
        "avx2/float32/few_rows": "cpu",
        "sm_90/bfloat16/few_rows": "triton",
        "sm_90/bfloat16/many_rows": "triton",
    }


def test_a_ratio_needs_both_sides() -> None:
    timed: dict[str, Any] = {"status": "timed", "milliseconds": 3.0}
    assert gpu_tables._ratio(timed, {"status": "timed", "milliseconds": 4.0}) == 0.75
    assert gpu_tables._ratio({"status": "wrong"}, timed) is None
    assert gpu_tables._ratio({"status": "failed"}, {}) is None


@pytest.mark.long
def test_a_dry_run_asks_for_every_operator_with_triton_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    before = {op: tables.table_path(op).read_bytes() for op in tables.OPS}
    assert gpu_tables.main(["--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Attention is the libraries' own on a GPU, and linear layers are where their weights are not quantised.
    others = {"adamw_8bit", "attention_decode", "attention_varlen"}
    assert set(found) == set(tables.OPS) - others
    assert set(found["linear"]) == {"float16/few_rows-int8", "float16/few_rows-nf4"}
    assert set(found["dequantise"]) == {"float16/int8", "float16/nf4"}
    assert {op: tables.table_path(op).read_bytes() for op in tables.OPS} == before


def test_without_a_gpu_it_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_tables.main([]) == 2
    assert "needs a GPU that torch can use" in capsys.readouterr().err
