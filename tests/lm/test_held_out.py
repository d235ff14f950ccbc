"""The same tokens by each engine: in float32 all find the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier.lm.held_out import plain_logprobs, sampler_logprobs
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora, use_adapter
from luthier.lm.made import HeldOutRow
from luthier.lm.passes import Pass, forward_together
from luthier.lm.scoring import sequence_logprobs

ModelMaker = Callable[..., Any]
ROW = HeldOutRow(token_ids=(5, 9, 11, 40, 3, 17, 60, 2), positions=(1, 3, 4, 7))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_generation_and_a_plain_pass_find_what_scoring_finds(tiny_model: ModelMaker, family: str) -> None:
    model = tiny_model(family)
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=1)
    for parameter in adapter_parameters(model, "default").values():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    mask = [place in ROW.positions for place in range(len(ROW.token_ids))]
    with use_adapter(model, "default"):
        (expected,) = sequence_logprobs(model, [ROW.token_ids], [mask])
        sampled, plain = sampler_logprobs(model, ROW), plain_logprobs(model, [ROW])
    assert len(sampled) == expected.num_tokens == 4
    assert sampled == pytest.approx(list(plain), abs=1e-4)
    assert sum(plain) == pytest.approx(expected.logprob, abs=1e-4)
    assert sampled != pytest.approx(sampler_logprobs(model, ROW), abs=1e-2), "the adapter counts"


def test_the_prompt_is_read_at_once_and_each_token_after_it_by_itself(
    tiny_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []

    def counted_together(model: Any, wanted: list[Pass]) -> Any:
        widths.extend(one.ids.shape[1] for one in wanted)
        return forward_together(model, wanted)

    monkeypatch.setattr("luthier.lm.held_out.forward_together", counted_together)
    row = HeldOutRow(token_ids=ROW.token_ids, positions=(4, 6))
    model = tiny_model()
    assert sampler_logprobs(model, row) == pytest.approx(list(plain_logprobs(model, [row])), abs=1e-4)
    assert widths == [4, 1, 1]
    assert sampler_logprobs(model, HeldOutRow(token_ids=ROW.token_ids, positions=())) == []


def test_rows_come_one_after_another(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    other = HeldOutRow(token_ids=(7, 8, 9), positions=(2,))
    both = plain_logprobs(model, [ROW, other])
    assert both == (*plain_logprobs(model, [ROW]), *plain_logprobs(model, [other]))
    assert plain_logprobs(model, []) == ()
