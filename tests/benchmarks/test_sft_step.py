from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import sft_step
from sft_step_contenders import DEFAULTS, METHODS, OURS, heldout_loss, measure
from sft_step_costs import LOSS, OTHER, group_costs
from sft_step_loop import packed_inputs
from sft_step_report import outcome_of, picture, summary_of, table
from sft_step_task import IGNORED, MAX_ROW_TOKENS, ROWS_PER_STEP, Row, Task, render_rows
from sft_step_trl import Variant, places

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    arguments = Namespace(
        method="lora",
        rows=32,
        heldout=8,
        steps=3,
        data=None,
        model=None,
        fast=True,
        micro_batch_tokens=1024,
    )
    return sft_step.make_task(arguments, tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def full_task(task: Task) -> Task:
    return replace(task, method="full")


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_parent: Event | None = None
    input_shapes: list[list[int]] | None = None


def row(length: int) -> Row:
    return Row(ids=tuple(range(length)), supervised=(False,) * (length - 1) + (True,))


def run(seconds: list[float], heldout: float | None) -> dict[str, Any]:
    return {
        "step_seconds": seconds,
        "step_tokens": [100] * len(seconds),
        "losses": [3.0] * len(seconds),
        "peak_rss_bytes": 2e9,
        "places_per_token": 1.0,
        "threads": 2,
        "heldout_loss": heldout,
    }


# peft 0.21 asks transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_ours_and_the_peft_loop_learn_the_same(task: Task) -> None:
    pytest.importorskip("peft")
    ours, peft = (measure(task, name, profiling=False, evaluating=True) for name in ("ours", "peft"))
    assert ours["heldout_loss"] == pytest.approx(peft["heldout_loss"], rel=2e-3)
    assert ours["losses"] == pytest.approx(peft["losses"], rel=1e-2)
    assert len(ours["losses"]) == len(ours["step_seconds"]) == len(peft["step_seconds"]) == 3
    # What both learnt is far more than what they differ by.
    assert ours["heldout_loss"] < 0.995 * heldout_loss(task, lambda _: None)


def test_ours_and_the_plain_loops_learn_the_same_with_all_weights(full_task: Task) -> None:
    ours, plain, cast = (
        measure(full_task, name, profiling=False, evaluating=True)
        for name in ("ours", "plain_float32", "plain")
    )
    before = heldout_loss(full_task, lambda _: None)
    learnt = before - plain["heldout_loss"]
    assert learnt > 0
    for one in (ours, cast):
        assert one["heldout_loss"] == pytest.approx(plain["heldout_loss"], abs=0.1 * learnt)
        assert one["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    assert len(ours["losses"]) == len(ours["step_seconds"]) == len(plain["step_seconds"]) == 3


def test_measure_profiles_the_second_step(task: Task) -> None:
    measured = measure(task, "ours", profiling=True, evaluating=False)
    assert measured["costs"]["groups"]["matmul"] > 0
    assert measured["heldout_loss"] is None


def test_steps_take_every_row_once_an_epoch(task: Task) -> None:
    steps = [list(chain.from_iterable(step)) for step in task.steps()]
    assert [len(rows) for rows in steps] == [ROWS_PER_STEP] * 3
    assert set(steps[0] + steps[1]) == set(task.rows)
    assert all(
        sum(len(one.ids) for one in batch) <= task.micro_batch_tokens
        for step in task.steps()
        for batch in step
    )


def test_load_reads_what_save_wrote(task: Task, tmp_path: Path) -> None:
    task.save(tmp_path / "task.json")
    assert Task.load(tmp_path / "task.json") == task
    assert Task.load(tmp_path / "task.json", num_steps=2).steps() == task.steps()[:2]


def test_render_rows_passes_over_long_records(task: Task) -> None:
    records = [
        {"instruction": "a", "input": "", "output": "b " * MAX_ROW_TOKENS},
        {"instruction": "a", "input": "", "output": "b"},
    ]
    (short,) = render_rows(records, task.model, 1)
    assert len(short.ids) < MAX_ROW_TOKENS
    with pytest.raises(ValueError, match="2 records of at most 512 tokens are needed, got 1"):
        render_rows(records, task.model, 2)


def test_packed_inputs_begin_positions_anew() -> None:
    inputs = packed_inputs([row(3), row(2)])
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["labels"].tolist() == [[IGNORED, IGNORED, 2, IGNORED, 1]]


def test_places_counts_padding(task: Task) -> None:
    real = sum(task.step_tokens())
    assert places(task, Variant(packing=True)) == places(task, Variant(padding_free=True)) == real
    first = [len(one.ids) for one in chain.from_iterable(task.steps()[0])]
    rows = tuple(chain.from_iterable(task.steps()[0]))
    alone = replace(task, rows=rows, heldout=(), num_steps=1, micro_batch_tokens=10**6)
    assert places(alone, Variant()) >= sum(first)
    assert places(alone, Variant()) % 8 == 0


def test_group_costs_counts_every_second_once() -> None:
    around = Event("LogSoftmaxBackward0", 1e6)
    events = [
        around,
        Event("aten::mm", 2e6, around),
        Event("aten::mm", 3e6),
        Event("aten::mul", 4e6),
        Event("aten::copy_", 5e6),
        Event("aten::mm", 0.5e6, None, [[4, 8], [8, 1000]]),
        Event("aten::embedding", 0.25e6, None, [[1000, 8], [4]]),
    ]
    costs = group_costs(events, seconds=20.0, vocab_size=1000)
    assert costs.groups[LOSS] == 3.5
    assert costs.groups["matmul"] == 3
    assert costs.groups["element-wise"] == 4
    assert costs.groups["copies and casts"] == 5.25
    assert costs.groups[OTHER] == 4.25
    assert costs.operators["aten::mm"] == 5.5


def test_outcome_of_leaves_the_first_step_out() -> None:
    outcome = outcome_of([run([50.0, 1.0, 1.0], 2.5), run([50.0, 2.0, 2.0], None)], None)
    assert outcome["tokens_per_second"] == 75
    assert outcome["heldout_loss"] == 2.5


def test_summary_of_compares_with_the_fastest_peer() -> None:
    outcomes = {
        "ours": outcome_of([run([9, 1.0], 2.002)], None),
        "ours_eager": outcome_of([run([9, 0.5], 2.0)], None),
        "trl_defaults": outcome_of([run([9, 8.0], 2.1)], None),
        "peft": outcome_of([run([9, 2.0], 2.0)], None),
        "peft_compiled": {"error": "exit 1"},
    }
    summary = summary_of(outcomes, ("ours", "ours_eager"), "trl_defaults", "peft")
    assert summary == {
        "tps_vs_best_peer": 2.0,
        "best_peer": "peft",
        "rss_vs_best_peer": 1.0,
        "tps_vs_trl_defaults": 8.0,
        "rss_vs_trl_defaults": 1.0,
        "heldout_loss_gap": 0.001,
    }


def test_summary_of_says_none_for_what_did_not_run() -> None:
    outcomes = {"ours": outcome_of([run([9, 1.0], 2.0)], None), "peft": {"error": "exit 1"}}
    summary = summary_of(outcomes, ("ours",), "trl_defaults", "peft", "full_vs_best_peer")
    assert set(summary.values()) == {None}
    assert next(iter(summary)) == "full_vs_best_peer"


def test_table_and_picture_show_every_contender() -> None:
    costs = {"seconds": 2.0, "groups": {"matmul": 1.5, OTHER: 0.5}, "operators": {}}
    outcomes = {"ours": outcome_of([run([9, 1.0], 2.0)], {"costs": costs}), "peft": {"error": "no <peft>"}}
    outcomes["trl_defaults"] = outcome_of([run([9, 8.0], 2.0)], {"error": "no profiler"})
    shown = table(outcomes, {"ours": "our way", "peft": "their way", "trl_defaults": ""})
    assert "did not run: no <peft>" in shown
    assert "matmul 1.50 s (75 %)" in shown
    assert "not profiled: no profiler" in shown
    assert picture(outcomes, "full").count("<rect") > 3


def test_run_child_names_a_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for method, names in ((METHODS["lora"], "trl, datasets, peft"), (METHODS["full"], "trl, datasets")):
        contender = method.contenders["trl_packing"]
        error = sft_step.run_child(tmp_path / "t", "trl_packing", contender)["error"]
        assert error.startswith(f"{names} not installed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rows": 20}, "multiple of 16, got 20"), ({"rows": 16}, "at least 2, as the first one is not timed")],
)
def test_make_task_refuses_what_cannot_be_measured(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    arguments = Namespace(**({"rows": 32, "heldout": 8, "steps": 0} | changes))
    with pytest.raises(ValueError, match=message):
        sft_step.make_task(arguments, tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["--fast", "--contenders", "ours,nobody"],
        ["--fast", "--method", "full", "--contenders", "peft"],
        ["--rows", "64"],
    ],
)
def test_parse_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sft_step.parse(argv)
    assert "--contenders must be of" in capsys.readouterr().err or argv == ["--rows", "64"]


def test_contenders_are_described() -> None:
    for method in METHODS.values():
        assert all(contender.configuration for contender in method.contenders.values())
        assert {*OURS, DEFAULTS, method.reference} < set(method.contenders)
    assert len({method.results for method in METHODS.values()}) == len(METHODS)
    assert sft_step.parse(["--fast", "--method", "full"]).contenders == list(METHODS["full"].contenders)
