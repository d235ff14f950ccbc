"""The benchmark of forms that leave: each form is read again, and what differs is told as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import take_away
from quantised_loss import news
from sft_step_task import Row, tiny_model
from take_away import FAST, NUM_HELD_OUT_TOKENS, Said, asked_of, compared, measured, summary_of

pytestmark = pytest.mark.usefixtures("one_thread")
LEARNT = Row(ids=tuple(range(100)), supervised=(False,) * 60 + (True,) * 40)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("taken")
    texts = [{"text": turn["content"]} for one in news("train", 50, 0) for turn in one["messages"]]
    return measured(tiny_model(folder / "tiny", texts), FAST, folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers what that renamed
def test_every_form_is_registered_again_and_holds_what_was_learnt(document: dict[str, Any]) -> None:
    forms = document["forms"]
    assert list(forms) == ["base", "peft", "merged", "gguf_f16", "gguf_q8_0"]
    assert document["num_held_out_tokens"] == NUM_HELD_OUT_TOKENS
    learnt = forms["base"]["mean_logprob_difference"]
    assert forms["peft"]["mean_logprob_difference"] < 1e-4
    for name in ("merged", "gguf_f16", "gguf_q8_0"):
        assert 0 < forms[name]["mean_logprob_difference"] < learnt, name
        assert forms[name]["check"]["difference"] <= forms[name]["check"]["bound"]
        assert forms[name]["check"]["effect"] > 0
        assert forms[name]["size_bytes"] > 10_000
    assert forms["gguf_f16"]["mean_logprob_difference"] < forms["gguf_q8_0"]["mean_logprob_difference"]
    assert forms["gguf_q8_0"]["size_bytes"] < forms["gguf_f16"]["size_bytes"]
    assert all(one["mean_logprob_difference"] < learnt for one in document["engines"].values())
    summary = summary_of(document)
    assert summary["merged_logprob_difference"] == round(forms["merged"]["mean_logprob_difference"], 5)
    assert summary["gguf_q8_0_equal_answers"] == forms["gguf_q8_0"]["num_equal_answers"]


def test_held_out_tokens_are_the_first_learnt_ones_and_answers_begin_where_learning_does() -> None:
    asked = asked_of([LEARNT, LEARNT, LEARNT], FAST)
    assert [len(row.positions) for row in asked.held_out] == [40, 24]
    assert asked.held_out[1].positions == tuple(range(60, 84))
    assert asked.prompts == (LEARNT.ids[:60],) * 3


def test_too_few_held_out_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="64 held-out tokens are needed, 24 are missing"):
        asked_of([LEARNT], FAST)


def test_answers_are_the_same_as_wholes_and_up_to_where_they_part() -> None:
    reference = Said(logprobs=(-1.0, -2.0), answers=((1, 2, 3), (4, 5), (6,)))
    found = compared(Said(logprobs=(-1.5, -2.1), answers=((1, 2, 3), (4, 9), (6, 7))), reference)
    assert found["mean_logprob_difference"] == pytest.approx(0.3)
    assert found["largest_logprob_difference"] == pytest.approx(0.5)
    assert (found["num_equal_answers"], found["num_answers"]) == (1, 3)
    assert (found["num_equal_leading_tokens"], found["num_answer_tokens"]) == (5, 6)


def test_a_smoke_run_writes_no_results(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    document: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(take_away, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(take_away, "measured", lambda *_: document)
    assert take_away.main(["--fast"]) == 0
    assert not (tmp_path / "results").exists()
    assert '"merged_equal_answers"' in capsys.readouterr().out.splitlines()[-1]
