"""Plans are compared with runs on a device: what is planned is of that device, and a run without memory is told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_check_plan
import pytest
import torch
from calibration import Configuration, Scale, expected, make_model

from luthier.training.recipes.footprint import Speed

CPU = torch.device("cpu")


def test_on_a_gpu_a_plan_counts_on_a_share_of_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    speed = gpu_check_plan.speed_here(torch.device("cuda:0"))
    assert speed is not None
    assert speed.operations == pytest.approx(0.4 * 989e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Another")
    assert gpu_check_plan.speed_here(torch.device("cuda:0")) is None


def test_sizes_for_a_gpu_can_be_planned(tmp_path: Path) -> None:
    """The plan's side, as it is on a device: its model is not made, its config is."""
    scale = gpu_check_plan.ON_GPU
    make_model(tmp_path, Scale(hidden=64, heads=16, layers=1, vocabulary=64))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "hidden_size": scale.hidden,
        "intermediate_size": 3 * scale.hidden,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.heads // 2,
        "vocab_size": scale.vocabulary,
        "head_dim": scale.hidden // scale.heads,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    speed = Speed(operations=400e12, trained_head=400e12, bytes=4e12)
    by_name = {
        one.name: expected(one, tmp_path, speed, scale, "GPU") for one in gpu_check_plan.configurations(scale)
    }
    memories = [memory for memory, _ in by_name.values()]
    none, selective, full, whole = memories
    assert full < selective < none, "what layers keep is what differs"
    assert whole > 14 * 400e6
    assert max(memories) < 24 << 30, "it fits into smaller GPUs, too"
    assert all(0.01 < spent < 5 for _, spent in by_name.values())


def test_a_run_that_finds_no_memory_says_so_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(one: Configuration, *_: Any) -> dict[str, Any]:
        if one.kept == "NONE":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return {"name": one.name, "memory_error": 0.1, "time_error": None}

    monkeypatch.setattr(gpu_check_plan, "measured", run)
    found = gpu_check_plan.check(CPU)
    assert found["runs"][0] == {"name": "adapter, NONE", "why": "tried to allocate 20 GiB"}
    assert (found["largest_memory_error"], found["largest_time_error"]) == (0.1, None)


def test_each_way_of_training_is_run_and_planned_on_a_processor() -> None:
    found = gpu_check_plan.check(CPU)
    assert len(found["runs"]) == 4
    for run in found["runs"]:
        assert run["memory_bytes"] != 0
        assert run["planned_memory_bytes"] > 0 < run["step_seconds"]
    assert found["largest_time_error"] == max(run["time_error"] for run in found["runs"])
