"""The arithmetic of scaling: by hand, by what ranks really exchange, and as it is committed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import scaling
import scaling_report
import torch
from scaling import FAST, SLOW, Setting, outcome
from tests.training.recipes.crews import on_ranks

from luthier.training.recipes.collective import Collective
from luthier.training.recipes.process_group import Replicas

EIGHT = Setting(
    model="8B", is_whole=False, sharding="replicated", machine=FAST, num_gpus=8, step_tokens=2_097_152
)


def test_sizes_are_those_of_the_models() -> None:
    billions = {name: shape.num_parameters / 1e9 for name, shape in scaling.MODELS.items()}
    assert {name: round(count, 1) for name, count in billions.items()} == {
        "1B": 1.2,
        "3B": 3.2,
        "8B": 8.0,
        "14B": 14.8,
        "32B": 32.8,
        "70B": 70.6,
    }


def test_replicated_ranks_send_a_ring_of_float32_gradients() -> None:
    # 32 layers of q, o: 4096 + 4096; k, v: 4096 + 1024; gate, up, down: 4096 + 14336; 16 ranks each.
    factors = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert EIGHT.trained.num_trained == factors
    assert outcome(EIGHT).sent == pytest.approx(2 * 7 / 8 * 4 * factors)


def test_sharded_ranks_send_weights_twice_and_gradients_once_a_pass() -> None:
    setting = replace(EIGHT, is_whole=True, sharding="fsdp2", num_gpus=64)
    shape = setting.shape
    assert setting.passes_of_a_rank == 2_097_152 // 8192 // 64 == 4
    words = 2 * shape.vocabulary * shape.hidden
    a_pass = (2 + 2 + 4) * shape.num_products + (2 + 4) * words
    assert outcome(setting).sent == pytest.approx(4 * 63 / 64 * a_pass)


class Meetings:
    """Adds up what is exchanged."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def enter(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def leave(self) -> None:
        """Nothing is counted."""


def test_what_ranks_really_sum_in_a_step_is_what_is_counted(tmp_path: Path) -> None:
    def work(collective: Collective) -> int:
        meetings = Meetings()
        ranks = Replicas(torch.device("cpu"), meetings)
        ranks.sum_gradients([torch.ones(1000, 16), torch.ones(16, 500)])
        return meetings.num_bytes

    num_trained = 1000 * 16 + 16 * 500
    assert on_ranks(2, tmp_path, work) == [4 * num_trained] * 2


def test_a_pass_is_no_shorter_than_its_products_or_its_exchanges() -> None:
    for machine in (FAST, SLOW):
        setting = replace(EIGHT, is_whole=True, sharding="fsdp2", num_gpus=256, machine=machine)
        products = scaling.pass_seconds(setting, setting.pass_tokens, "FULL")
        layers = setting.shape.layers
        links = scaling.gather_seconds(setting, scaling.root_bytes(setting)) + layers * (
            2 * scaling.gather_seconds(setting, scaling.layer_bytes(setting))
            + scaling.gather_seconds(setting, scaling.given_bytes(setting))
        )
        took = scaling.sharded_pass_seconds(setting, products, "FULL")
        assert max(products, links) <= took * (1 + 1e-9)
        assert took < products + links


def test_more_ranks_than_passes_are_idle_and_a_slower_network_is_never_quicker() -> None:
    few = replace(EIGHT, step_tokens=131_072)
    assert [replace(few, num_gpus=count).pass_tokens for count in (8, 16, 64, 256)] == [
        8192,
        8192,
        2048,
        1024,
    ]
    found = {count: outcome(replace(few, num_gpus=count)) for count in (128, 256, 512)}
    assert found[256].efficiency == pytest.approx(found[128].efficiency / 2, rel=0.02)
    for sharding in ("replicated", "fsdp2"):
        for count in scaling.GPUS[1:]:
            fast = replace(EIGHT, num_gpus=count, sharding="fsdp2" if sharding == "fsdp2" else "replicated")
            assert outcome(replace(fast, machine=SLOW)).step_seconds >= outcome(fast).step_seconds


def test_what_does_not_fit_says_so_and_is_sharded_until_it_does() -> None:
    large = replace(EIGHT, model="70B", is_whole=True)
    assert outcome(large).kept == ""
    assert outcome(large).memory > 16 * 70e9
    assert outcome(replace(large, sharding="fsdp2")).kept == ""
    assert outcome(replace(large, sharding="fsdp2", num_gpus=64)).kept


def test_what_is_committed_is_what_it_makes() -> None:
    rows = scaling.rows()
    assert (scaling.RESULTS / "scaling.json").read_text() == scaling_report.as_json(rows)
    assert (scaling.RESULTS / "scaling.svg").read_text() == scaling_report.picture(rows)
    page = scaling.PAGE.read_text()
    assert scaling_report.with_tables(page, rows, scaling.ENOUGH) == page


def test_the_last_line_says_how_far_each_way_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{scaling_report.BEGIN}\nold\n{scaling_report.END}\nb\n")
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["scaling.py"])
    scaling.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["rows"] == 768
    assert last["scales_to"]["8 x 400 Gb/s, all weights, 131072 tokens, 70B, replicated"] == 0
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("\nb\n")
    assert "old" not in page.read_text()
    with pytest.raises(ValueError, match="must have the marks"):
        scaling_report.with_tables("nothing", [], 0.5)
