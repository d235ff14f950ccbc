"""What a job trains, read from its message, and which of its passes fit into a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training.recipes.test_footprint import FACTORS, SHAPE

from luthier.errors import InvalidArgument
from luthier.lm.cache import BufferedLayer
from luthier.lm.generate import GenerationRequest
from luthier.lm.kept import CHECKPOINTINGS
from luthier.lm.sampling import sample
from luthier.lm.shape import shape_of
from luthier.training import fitting
from luthier.training.fitting import Rows, fit_of, fits_of, trained_of, what_would, work_of
from luthier.training.jobs.rules import resolved
from luthier.training.recipes.batches import PlanTotals
from luthier.training.recipes.footprint import activation_bytes
from luthier.training.recipes.rollouts import _CACHE_BATCHES
from luthier.v1.fine_tuning_job_pb2 import (
    ACTIVATION_CHECKPOINTING_SELECTIVE,
    SHARDING_FSDP2,
    FineTuningJob,
    FullConfig,
    Hyperparameters,
    LoraConfig,
    PreferenceConfig,
    RankRange,
    ReinforcementConfig,
    RewardModelConfig,
)

ROWS = Rows(longest=300, largest=20_000, scored_share=0.5, num_tokens=10**6)
_LOSS = PreferenceConfig.Loss


def job(**changes: Any) -> FineTuningJob:
    chosen = {"lora": LoraConfig(rank=2)} if "full" not in changes else {}
    names = {"base_model": "projects/p/models/m", "rendering": "projects/p/renderings/r"}
    return resolved(FineTuningJob(**{**names, **chosen, **changes}))


def steered(**hyperparameters: Any) -> FineTuningJob:
    return job(hyperparameters=Hyperparameters(**hyperparameters))


def test_an_adapter_has_the_factors_of_its_targets_and_ranks() -> None:
    assert trained_of(job(), SHAPE).num_factors == FACTORS
    some = LoraConfig(
        rank=2, target_modules=["q_proj", "mlp.down_proj"], rank_pattern={r"0\.self_attn\..*": 6}
    )
    found = trained_of(job(lora=some), SHAPE)
    assert found.num_factors == 10 * 2 * (128 + 192) + 4 * 128
    assert found.sum_of_ranks == 10 * 4 + 4
    with pytest.raises(InvalidArgument, match="must match a module that the adapter changes"):
        trained_of(job(lora=LoraConfig(rank_pattern={"nothing": 3})), SHAPE)


def test_dora_has_a_length_for_each_output_and_keeps_what_it_is_multiplied_with() -> None:
    plain, dora = (trained_of(job(lora=LoraConfig(rank=2, use_dora=used)), SHAPE) for used in (False, True))
    outputs = sum(SHAPE.linear(module).outputs for module in SHAPE.modules())
    assert (plain.num_scaled, dora.num_scaled) == (0, outputs)
    assert dora.num_factors == plain.num_factors + outputs
    more = activation_bytes(dora, 100, "NONE", "GPU") - activation_bytes(plain, 100, "NONE", "GPU")
    assert more == pytest.approx(1.05 * 100 * 4 * outputs, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("LOSS", False, False)),
        ({"preference": PreferenceConfig()}, ("LOGPROBS", True, False)),
        ({"preference": PreferenceConfig(loss=_LOSS.LOSS_ORPO)}, ("LOGPROBS", False, False)),
        ({"preference": PreferenceConfig(loss=_LOSS.LOSS_KTO)}, ("LOGPROBS", True, False)),
        ({"preference": PreferenceConfig(), "full": FullConfig()}, ("LOGPROBS", False, False)),
        ({"reward_model": RewardModelConfig()}, ("VALUES", False, False)),
        ({"reinforcement": ReinforcementConfig()}, ("LOGPROBS_AND_ENTROPIES", False, False)),
        ({"reinforcement": ReinforcementConfig(kl_weight=0.1)}, ("LOGPROBS_AND_ENTROPIES", True, False)),
        (
            {"reinforcement": ReinforcementConfig(kl_weight=0.1), "full": FullConfig()},
            ("LOGPROBS_AND_ENTROPIES", True, True),
        ),
    ],
)
def test_what_is_read_and_compared_follows_from_the_method(
    changes: dict[str, Any], expected: tuple[str, bool, bool]
) -> None:
    found = trained_of(job(**changes), SHAPE)
    assert (found.read, found.has_reference, found.keeps_reference) == expected


@pytest.mark.parametrize(
    ("modules", "tied", "whole", "head"),
    [
        ([], True, 0, False),
        (["embed_tokens"], True, 64_000, True),
        (["embed_tokens"], False, 64_000, False),
        (["lm_head"], False, 64_000, True),
        (["embed_tokens", "lm_head"], False, 128_000, True),
    ],
)
def test_modules_that_are_trained_whole_are_counted_once_where_they_are_one_weight(
    modules: list[str], tied: bool, whole: int, head: bool
) -> None:
    found = trained_of(job(lora=LoraConfig(rank=2, trained_modules=modules)), replace(SHAPE, is_tied=tied))
    assert (found.num_whole, found.has_trained_head) == (whole, head)


@pytest.mark.parametrize("method", [{}, {"preference": PreferenceConfig()}])
def test_logits_are_held_where_the_tables_leave_the_head_to_plain_torch(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "current_isa", lambda: "avx2")
    assert not trained_of(job(**method), SHAPE).holds_logits
    monkeypatch.setattr(fitting, "entries", lambda _: {})
    assert trained_of(job(**method), SHAPE).holds_logits, "what was not measured is plain torch's"
    # That of a trained head is counted by itself, and values take none.
    assert not trained_of(job(full=FullConfig(), **method), SHAPE).holds_logits
    assert not trained_of(job(reward_model=RewardModelConfig()), SHAPE).holds_logits


def test_gates_are_kept_activated_where_the_tables_leave_them_to_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for isa, is_kept in (("avx2", True), ("amx_bf16", False), ("avx512_bf16", False)):
        monkeypatch.setattr(fitting, "current_isa", lambda isa=isa: isa)
        assert trained_of(job(), SHAPE).keeps_gates is is_kept, isa
    monkeypatch.setattr(fitting, "entries", lambda _: {})
    assert trained_of(job(), SHAPE).keeps_gates, "what was not measured is plain torch's"


def test_prompts_count_once_an_answer() -> None:
    totals = PlanTotals(
        num_rows=9,
        num_steps=3,
        num_steps_per_epoch=3,
        num_tokens=900,
        num_supervised=300,
        packing_efficiency=1.0,
        largest_step_tokens=400,
        num_seen=5000,
    )
    work = work_of(job(reinforcement=ReinforcementConfig(num_samples=4)), totals)
    assert (work.num_tokens, work.num_scored, work.num_seen, work.num_drawn) == (3600, 1200, 20_000, 1200)
    assert work_of(job(), totals).num_drawn == 0


def test_what_is_left_open_is_chosen_from_the_fastest_on() -> None:
    trained = trained_of(job(), SHAPE)
    every = list(fits_of(job(), trained, ROWS, "CPU", 0))
    chosen = [(one.micro_batch_tokens, one.kept) for one in every]
    assert chosen[:4] == [(4096, "NONE"), (2048, "NONE"), (1024, "NONE"), (4096, "SELECTIVE")]
    assert chosen[-2:] == [(512, "FULL"), (300, "FULL")]
    assert all(one.fits for one in every), "no limit is known"
    peaks = [one.footprint.peak for one in every if one.kept == "FULL"]
    assert peaks == sorted(peaks, reverse=True)
    on_gpu = next(iter(fits_of(job(), trained, ROWS, "GPU", 0)))
    assert on_gpu.micro_batch_tokens == 32_768
    shared = next(iter(fits_of(job(), trained, replace(ROWS, largest=4000, num_ranks=3), "CPU", 0)))
    assert shared.micro_batch_tokens == 1334, "each rank has a pass of the largest step"
    long = next(iter(fits_of(job(), trained, replace(ROWS, longest=5000), "CPU", 0)))
    assert long.micro_batch_tokens == 5000, "the longest row is a pass"


def test_what_a_job_says_stays() -> None:
    said = steered(micro_batch_tokens=700)
    trained = trained_of(said, SHAPE)
    assert [(one.micro_batch_tokens, one.kept) for one in fits_of(said, trained, ROWS, "CPU", 0)] == [
        (700, kept) for kept in CHECKPOINTINGS
    ]
    both = steered(micro_batch_tokens=700, activation_checkpointing=ACTIVATION_CHECKPOINTING_SELECTIVE)
    assert [one.kept for one in fits_of(both, trained, ROWS, "CPU", 0)] == ["SELECTIVE"]


def test_the_first_that_fits_is_the_largest_with_room_to_spare() -> None:
    trained = trained_of(job(), SHAPE)
    everything = list(fits_of(job(), trained, ROWS, "CPU", 0))
    for wanted in everything:
        limit = round(wanted.footprint.peak / 0.9) + 1
        found = next(one for one in fits_of(job(), trained, ROWS, "CPU", limit) if one.fits)
        assert found.footprint.peak <= wanted.footprint.peak
        if wanted.kept == "NONE":
            assert (found.micro_batch_tokens, found.kept) == (wanted.micro_batch_tokens, "NONE")


def test_what_would_fit_is_said() -> None:
    trained = trained_of(job(), SHAPE)
    said = steered(micro_batch_tokens=20_000)
    small = fit_of(trained, ROWS, 512, "FULL", "CPU", 0)
    limit = round(small.footprint.peak / 0.9) + 1
    words = what_would(said, trained, ROWS, "CPU", limit)
    assert words.startswith("micro_batch_tokens ")
    assert words.endswith(" would fit")
    rows = what_would(said, trained, replace(ROWS, longest=10**6, largest=10**6), "CPU", limit)
    assert rows.startswith("rows of at most ")
    none = what_would(said, trained, ROWS, "CPU", 1 << 20)
    assert none.startswith("no pass would: it needs a device of at least ")


def test_words_name_every_part() -> None:
    found = fit_of(trained_of(job(), SHAPE), ROWS, 1024, "NONE", "CPU", 1 << 30)
    assert found.words.startswith(
        "passes of 1024 tokens with activation_checkpointing NONE are expected to take "
    )
    for part in ("weights", "adapters", "gradients", "optimiser", "activations", "logits", "runtime"):
        assert f"{part} " in found.words
    assert found.words.endswith("of 1,024 MiB that there are")


def test_a_divided_model_is_counted_by_the_ranks_of_a_run_or_the_least_of_a_job() -> None:
    assert trained_of(job(), SHAPE, num_ranks=4).num_parts == 1
    said = job(sharding=SHARDING_FSDP2, ranks=RankRange(min_ranks=3, max_ranks=8))
    assert trained_of(said, SHAPE).num_parts == 3
    assert trained_of(said, SHAPE, num_ranks=6).num_parts == 6
    assert trained_of(job(sharding=SHARDING_FSDP2), SHAPE).num_parts == 2


def test_answers_that_are_drawn_hold_the_keys_and_values_that_are_planned(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 prompts of 10 tokens, four answers of up to 14 to each: of 16 passes of 30 tokens five prompts have room."""
    model, held = tiny_llama(torch.bfloat16), []
    hold = BufferedLayer._hold

    def seen(layer: BufferedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        held.append(keys.nbytes + values.nbytes)
        hold(layer, keys, values)

    monkeypatch.setattr(BufferedLayer, "_hold", seen)
    prompts = tuple(tuple(range(3, 13)) for _ in range(12))
    request = GenerationRequest(request_id="r", prompts=prompts, max_new_tokens=14, num_samples=4)
    answers = sample(model, request, limit_tokens=_CACHE_BATCHES * 30)
    assert {len(one.token_ids) for one in answers} == {14}
    drawing = job(reinforcement=ReinforcementConfig(num_samples=4, max_new_tokens=14))
    shape = shape_of({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    rows = Rows(longest=24, largest=12 * 4 * 24, scored_share=0.5, num_tokens=120)
    planned = fit_of(trained_of(drawing, shape), rows, 30, "NONE", "CPU", 0).footprint.cache
    assert planned == pytest.approx(shape.layers * max(held), rel=0.15)
    few = replace(rows, largest=2 * 4 * 24)
    assert fit_of(trained_of(drawing, shape), few, 30, "NONE", "CPU", 0).footprint.cache < planned / 2
