"""The profile of a decode step: operators are left out one at a time, and shares are of the right limit."""

from __future__ import annotations

from typing import Any

import decode_profile
import pytest
from decode_profile import FAST, KINDS, Limits, PartialProgram, limits_of, profiled, summary_of, without
from sft_step import made_up_records
from sft_step_task import tiny_model
from transformers import PreTrainedModel

from luthier.kernels.program import Program
from luthier.lm import decode_program
from luthier.lm.load import load_model

made_of: Any = decode_program
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(tiny_model(tmp_path_factory.mktemp("tiny"), made_up_records(8)))


def test_a_tiny_model_is_profiled_and_left_as_it_was(model: PreTrainedModel) -> None:
    before = made_of.Program
    found = profiled(model, FAST)
    assert made_of.Program is before
    assert model not in made_of._programs or made_of._programs[model]
    assert 0 < found["limit_share"] < 1
    assert found["limit_share"] == pytest.approx(found["limit_seconds"] / found["step_seconds"], abs=0.05)
    assert set(found["largest"]) == {*KINDS, "head", "rest of the pass", "choosing tokens, Python"}
    assert list(found["largest"].values()) == sorted(found["largest"].values(), reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_left_out_is_never_told(
    model: PreTrainedModel, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in KINDS:
        real = getattr(Program, name)

        def noted(
            self: object, *words: object, name: str = name, real: Any = real, **options: object
        ) -> None:
            if isinstance(self, PartialProgram):  # the prompts before are read by whole ones
                told.append(name)
            real(self, *words, **options)

        monkeypatch.setattr(Program, name, noted)
    decode_profile.pass_seconds(model, FAST, kind)
    assert set(told) == set(KINDS) - {kind}
    with without(""):
        assert made_of.Program is PartialProgram


def test_a_step_reads_every_weight_and_every_key_once(model: PreTrainedModel) -> None:
    limits = limits_of(model, FAST)
    config = model.config
    base: Any = model.base_model
    weights = sum(one.numel() for one in base.layers.parameters() if one.dim() == 2)
    weights += config.vocab_size * config.hidden_size
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * FAST.rows * FAST.context
    assert limits.read_bytes == 2 * (weights + held)
    assert limits.products == FAST.rows * weights


def test_the_limit_is_the_slower_of_reading_and_multiplying() -> None:
    limits = Limits(read_bytes=100, products=30, bytes_per_second=50.0, products_per_second=10.0)
    assert limits.seconds == 3.0
    found = summary_of(10.0, 8.0, {"product": 3.0, "attend": 6.0, "head": 8.5}, limits)
    assert (found["limit_share"], found["pass_share"]) == (0.3, 0.375)
    assert found["largest"] == {
        "product": 5.0,
        "attend": 2.0,
        "choosing tokens, Python": 2.0,
        "rest of the pass": 1.0,
        "head": 0.0,
    }


def test_a_smoke_run_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_profile.main(["--fast"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert '"limit_share"' in line
