"""The benchmark of devices names each of its figures, and what is missing, and refuses what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import devices
import pytest
from devices import PARTS, Asked, Part

KEYS = (
    "child_step_ratio",
    "ranks2_vs_rank1",
    "rank_kill_seconds",
    "checkpoint_stall_steps",
    "int8_bytes_ratio",
    "nf4_bytes_ratio",
    "plan_memory_error",
    "plan_time_error",
    "plan_told_time_error",
)


def found_of(value: float) -> dict[str, dict[str, Any]]:
    return {name: dict.fromkeys(part.keys.values(), value) for name, part in PARTS.items()}


def test_the_figures_are_those_of_the_details() -> None:
    summary = devices.summary_of(found_of(0.12345))
    assert tuple(summary) == KEYS
    assert set(summary.values()) == {0.123}


def test_what_was_not_asked_for_is_null() -> None:
    found = found_of(1.0)
    del found["stall"]
    summary = devices.summary_of(found)
    assert [key for key in KEYS if summary[key] is None] == ["checkpoint_stall_steps"]


def asked_in(folder: Path) -> Asked:
    return Asked(folder=folder, rounds=1, is_fast=True)


def test_each_part_has_a_folder_and_one_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Asked) -> dict[str, Any]:
        raise RuntimeError("it is broken")

    parts = {
        "child": Part(measure=lambda asked: {"ratio": 1.0, "at": asked.folder.name}, keys={}),
        "plan": Part(measure=failing, keys={}),
    }
    monkeypatch.setattr(devices, "PARTS", parts)
    found = devices.measured(asked_in(tmp_path), ["child"])
    assert (found["child"]["ratio"], found["child"]["at"]) == (1.0, "child")
    assert len(found["child"]["load_before"]) == len(found["child"]["load_after"]) == 3
    with pytest.raises(RuntimeError, match="it is broken"):
        devices.measured(asked_in(tmp_path), ["plan"])


def test_quantised_weights_are_fewer_bytes(tmp_path: Path) -> None:
    found = devices.measured(asked_in(tmp_path), ["bytes"])["bytes"]
    # A small model's embedding, which stays as it is, is much of it.
    assert found["nf4_bytes_ratio"] < found["int8_bytes_ratio"] < 0.9
    assert found["peak_bytes"].keys() == {"BFLOAT16", "INT8", "NF4"}
    assert min(found["peak_bytes"].values()) > 0


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_file_is_written_where_all_parts_were_measured(
    is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "measured", lambda _, names: {name: found_of(1.0)[name] for name in names})
    results = tmp_path / "results.json"
    words = ["--results", str(results)]
    devices.main(words if is_whole else [*words, "--only", "child,plan"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(KEYS) <= set(printed)
    assert results.exists() == is_whole
    if is_whole:
        kept = json.loads(results.read_text())
        assert {key: kept[key] for key in KEYS} == printed
        assert {"processor", "instruction_set", "cores", "load"} <= set(kept["machine"])


@pytest.mark.parametrize("words", [["--only", "child,lunch"], ["--rounds", "0"]])
def test_what_it_cannot_do_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        devices.parse(words)
    assert "must be" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_the_fast_run_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.main(["--fast", "--results", str(tmp_path / "none")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = [key for key in KEYS if key not in summary.get("missing", {})]
    assert set(KEYS) - set(measured) <= {"int8_bytes_ratio", "nf4_bytes_ratio"}
    assert all(isinstance(summary[key], float) for key in measured)
    assert summary["rank_kill_seconds"] > 0 < summary["child_step_ratio"]
    assert not (tmp_path / "none").exists(), "figures of tiny models are not kept"
