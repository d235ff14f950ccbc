from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stack
from full_vs_lora import memory
from full_vs_lora.tune import (
    ALL,
    BASE,
    LORA,
    RECORD_SCORE,
    Costs,
    costs_of,
    estimates,
    have_learnt,
    table,
)

from luthier.v1.evaluation_pb2 import (
    SCORE_KIND_BINARY,
    VERDICT_BETTER,
    VERDICT_INCONCLUSIVE,
    VERDICT_INSUFFICIENT_EVIDENCE,
    ArmResult,
    Comparison,
    Evaluation,
    ScoreEstimate,
)
from luthier.v1.fine_tuning_job_pb2 import MetricPoint

_HELD_BYTES = 64 << 20
_HOLDING = f"held = b'x' * {_HELD_BYTES}; print('held', flush=True); input()"


def point(step: int, tokens: float, per_second: float) -> MetricPoint:
    return MetricPoint(step=step, values={"num_tokens": tokens, "tokens_per_second": per_second})


def arm(name: str, value: float, perplexity: float = 2.0) -> ArmResult:
    whole = ScoreEstimate(
        score=RECORD_SCORE, value=value, lower=value - 0.1, upper=value + 0.1, kind=SCORE_KIND_BINARY
    )
    return ArmResult(arm_id=name, scores=[whole, ScoreEstimate(score="perplexity", value=perplexity)])


def evaluated(adapter_lower: float, all_lower: float) -> Evaluation:
    pairs = ((LORA, BASE, adapter_lower), (ALL, BASE, all_lower), (ALL, LORA, -0.2))
    return Evaluation(
        arm_results=[arm(BASE, 0.2), arm(LORA, 0.7), arm(ALL, 0.6)],
        comparisons=[
            Comparison(
                candidate_arm_id=candidate,
                baseline_arm_id=baseline,
                score=RECORD_SCORE,
                lower=lower,
                upper=0.9,
                verdict=VERDICT_BETTER if lower > 0 else VERDICT_INCONCLUSIVE,
            )
            for candidate, baseline, lower in pairs
        ],
    )


def test_costs_leave_the_first_step_out() -> None:
    found = costs_of([point(1, 100, 1), point(2, 100, 50), point(3, 300, 100)], 5)
    assert found == Costs(seconds_per_step=2.5, tokens_per_second=80, peak_bytes=5)


def test_table_shows_each_score_and_cost_by_arm() -> None:
    costs = {
        LORA: Costs(seconds_per_step=1.5, tokens_per_second=500, peak_bytes=2 * 10**9),
        ALL: Costs(seconds_per_step=2.25, tokens_per_second=333.4, peak_bytes=4 * 10**9),
    }
    sizes = {BASE: 269_000_000, LORA: 19_500_000, ALL: 269_000_000}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(estimates(evaluated(0.1, 0.6)), costs, sizes).splitlines()
    ]
    assert rows[0] == ["", "base", "LoRA", "full"]
    assert set("".join(rows[1])) == {"-"}
    assert rows[2:] == [
        ["whole records right", "20.0 % [10.0, 30.0]", "70.0 % [60.0, 80.0]", "60.0 % [50.0, 70.0]"],
        ["perplexity", *["2"] * 3],
        ["seconds a step", "", "1.50", "2.25"],
        ["tokens/s", "", "500", "333"],
        ["peak memory, GB", "", "2.00", "4.00"],
        ["model's files, MB", "269.0", "19.5", "269.0"],
    ]


@pytest.mark.parametrize(
    ("adapter_lower", "all_lower", "learnt"), [(0.1, 0.2, True), (-0.1, 0.2, False), (0.1, -0.1, False)]
)
def test_both_must_have_learnt(
    adapter_lower: float, all_lower: float, learnt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert have_learnt(evaluated(adapter_lower, all_lower)) is learnt
    assert capsys.readouterr().out.splitlines()[-1].endswith(": inconclusive.")


def test_what_few_records_show_has_not_been_learnt(capsys: pytest.CaptureFixture[str]) -> None:
    few = evaluated(0.1, 0.2)
    few.comparisons[0].verdict = VERDICT_INSUFFICIENT_EVIDENCE
    assert not have_learnt(few)
    said = capsys.readouterr().out
    assert f"no proof that {LORA} won." in said
    assert f": {ALL} won." in said


def test_watched_knows_the_process_of_its_home_and_how_much_it_held(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDING, "a.worker"]
    environment = {**os.environ, "LUTHIER_HOME": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        assert memory.found("a.worker", tmp_path / "other") is None
        folder = memory.found("a.worker", tmp_path)
        assert folder is not None
        assert folder == Path("/proc") / str(process.pid)
        with memory.watched("a.worker", tmp_path) as held:
            while not held.peak_bytes:
                assert process.poll() is None
        assert _HELD_BYTES < held.peak_bytes < 4 * _HELD_BYTES
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(20) == 0
    assert memory.held_bytes(folder) is None


def test_watched_counts_what_a_process_holds_that_the_worker_started(tmp_path: Path) -> None:
    starting = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {_HOLDING!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", starting, "a.worker"],
        env={**os.environ, "LUTHIER_HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        with memory.watched("a.worker", tmp_path) as held:
            while held.peak_bytes < _HELD_BYTES:
                assert process.poll() is None
        assert held.peak_bytes < 4 * _HELD_BYTES
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(20) == 0


def test_watched_says_that_nobody_was_there(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"a process must run a\.worker on"),
        memory.watched("a.worker", tmp_path),
    ):
        pass


def test_an_example_without_a_control_refuses_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tune", "--control"])
    with pytest.raises(SystemExit):
        stack.play("", lambda stage: True, has_control=False)
    assert "unrecognized arguments: --control" in capsys.readouterr().err
