"""What a run takes, counted by hand for one model, and how it changes with what a job says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.lm.kept import CHECKPOINTINGS, Checkpointing
from luthier.lm.precision import Precision
from luthier.lm.shape import LinearShape, ModelShape
from luthier.training.recipes.footprint import (
    Footprint,
    LargestPass,
    Place,
    Speed,
    Trained,
    Work,
    activation_bytes,
    footprint,
    seconds,
)

LINEARS = (
    LinearShape(name="self_attn.q_proj", inputs=64, outputs=64),
    LinearShape(name="self_attn.k_proj", inputs=64, outputs=32),
    LinearShape(name="self_attn.v_proj", inputs=64, outputs=32),
    LinearShape(name="self_attn.o_proj", inputs=64, outputs=64),
    LinearShape(name="mlp.gate_proj", inputs=64, outputs=128),
    LinearShape(name="mlp.up_proj", inputs=64, outputs=128),
    LinearShape(name="mlp.down_proj", inputs=128, outputs=64),
)
SHAPE = ModelShape(
    hidden=64,
    layers=10,
    heads=4,
    key_heads=2,
    head_size=16,
    inner=128,
    vocabulary=1000,
    norms=2,
    has_head_norms=False,
    is_tied=True,
    linears=LINEARS,
)
PRODUCTS = 10 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
WEIGHTS = PRODUCTS + 10 * 2 * 64 + 64 + 64_000
# Rank 2 of each module: inputs and outputs.
FACTORS = 10 * 2 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
ADAPTER = Trained(shape=SHAPE, is_whole=False, num_factors=FACTORS, sum_of_ranks=10 * 14)
ALL = Trained(shape=SHAPE, is_whole=True, has_trained_head=True)
PASS = LargestPass(num_tokens=100, num_scored=50)
SPEED = Speed(operations=1e9, trained_head=1e8, bytes=1e9)
WORK = Work(num_tokens=1000, num_scored=500, num_seen=50_000, num_steps=10)


def test_weights_are_those_of_the_model() -> None:
    assert (SHAPE.num_products, SHAPE.num_parameters) == (PRODUCTS, WEIGHTS)


def test_an_adapter_takes_sixteen_bytes_a_factor_beside_the_model() -> None:
    found = footprint(ADAPTER, PASS, "NONE", num_row_tokens=10_000)
    assert (found.weights, found.adapters, found.gradients, found.optimiser) == (
        2 * WEIGHTS,
        4 * FACTORS,
        4 * FACTORS,
        8 * FACTORS,
    )
    assert found.logits == 50 * 64 * 6, "no logits: hidden states, and their gradient in float32"
    assert found.cache == 0
    assert found.runtime == footprint(ADAPTER, PASS, "NONE").runtime + 90_000


def test_all_weights_take_eighteen_bytes_each_and_what_a_trained_head_needs() -> None:
    found = footprint(ALL, PASS, "NONE")
    assert found.weights + found.adapters + found.gradients + found.optimiser == 18 * WEIGHTS
    assert found.logits >= 50 * 64 * 6 + 10 * 64_000
    whole = replace(ADAPTER, num_whole=64_000, has_trained_head=True)
    beside = footprint(whole, PASS, "NONE")
    before = footprint(ADAPTER, PASS, "NONE")
    assert beside.adapters - before.adapters == 2 * 64_000
    assert beside.optimiser - before.optimiser == 12 * 64_000
    assert beside.gradients - before.gradients == 4 * 64_000


def test_layers_keep_what_the_module_says() -> None:
    E, F, queries, keys = 64, 128, 64, 32
    tokens = 1000
    deep = replace(SHAPE, layers=1000)
    trained = replace(ADAPTER, shape=deep, sum_of_ranks=0)
    found = {
        kept: activation_bytes(trained, tokens, kept, "GPU") / (1.05 * 1000 * tokens)
        for kept in CHECKPOINTINGS
    }
    on_cpu = {
        kept: activation_bytes(trained, tokens, kept, "CPU") / (1000 * tokens) for kept in CHECKPOINTINGS
    }
    none = 2 * (4 * E + 2 * queries + 2 * keys + 3 * F) + 8 * 4
    selective = 2 * (3 * E + 2 * queries + 2 * keys + 2 * F) + 8 * 4
    # What is passing through one of a thousand layers is little.
    assert found["NONE"] == pytest.approx(none, rel=0.01)
    assert found["SELECTIVE"] == pytest.approx(selective, rel=0.01)
    assert found["FULL"] == pytest.approx(2 * E, rel=0.05)
    assert all(on_cpu[kept] > found[kept] for kept in CHECKPOINTINGS), "holes"
    whole = activation_bytes(replace(trained, is_whole=True), tokens, "NONE", "GPU") / (1.05 * 1000 * tokens)
    assert whole == pytest.approx(none + 2 * 6 * E, rel=0.01)


def test_gates_that_plain_torch_activates_are_kept_once_more_on_a_processor() -> None:
    """By each layer that keeps all; by others once, in the layer that is computed again."""
    tokens, layers, F = 1000, 1000, 128
    plain = replace(ADAPTER, shape=replace(SHAPE, layers=layers), keeps_gates=True)
    fused = replace(plain, keeps_gates=False)

    def more(kept: Checkpointing, place: Place = "CPU") -> float:
        with_gates, without = (activation_bytes(one, tokens, kept, place) for one in (plain, fused))
        return (with_gates - without) / (2 * F * tokens)

    assert 1.0 <= more("NONE") / layers < 1.3, "and its share of holes"
    assert more("SELECTIVE") == pytest.approx(1.0)
    passing = 2 * (3 * F + 3 * plain.shape.hidden)
    assert more("FULL") == pytest.approx(1.0 + 0.2 * layers * passing / (2 * F)), (
        "its gradients leave more holes"
    )
    beside_numbers = [
        activation_bytes(replace(fused, precision=one), tokens, "FULL", "CPU") for one in ("BFLOAT16", "INT8")
    ]
    assert beside_numbers[1] - beside_numbers[0] == pytest.approx(0.1 * tokens * layers * passing)
    assert more("NONE", "GPU") == 0.0


def test_a_pass_and_answers_that_are_drawn_take_turns() -> None:
    drawn = replace(ADAPTER, num_samples=8, max_new_tokens=64)
    few, many = (
        footprint(drawn, replace(PASS, num_cached=tokens), "NONE", place="GPU") for tokens in (10, 100_000)
    )
    assert many.cache == 4 * 10 * 2 * 16 * 100_000
    assert many.peak - many.cache == few.peak - few.activations - few.logits


def test_a_reference_that_is_kept_and_models_beside_are_weights() -> None:
    kept = footprint(replace(ALL, keeps_reference=True, other_bytes=77), PASS, "NONE")
    assert kept.weights == 4 * WEIGHTS + 77


def test_a_gpu_makes_logits_up_to_their_budget() -> None:
    small = footprint(ADAPTER, PASS, "NONE", place="GPU")
    large = footprint(ADAPTER, replace(PASS, num_scored=10**6), "NONE", place="GPU")
    assert small.logits == 50 * 64 * 6 + 16 * 1000 * 50
    assert large.logits == 10**6 * 64 * 6 + 512 * 2**20


def test_plain_torch_makes_logits_on_a_processor_too() -> None:
    without = footprint(ADAPTER, PASS, "NONE")
    held = footprint(replace(ADAPTER, holds_logits=True), PASS, "NONE")
    assert held.logits - without.logits == 16 * 1000 * 50
    assert held == replace(without, logits=held.logits)


def test_time_is_products_and_bytes() -> None:
    endless = replace(SPEED, bytes=1e30)
    seen = 1.6 * 4 * 10 * 4 * 16 * 50_000
    head = 2 * 64_000 * 500
    layers = 2 * PRODUCTS * 1000
    plain = layers + seen + layers + 2.5 * seen + 2 * head + 6 * FACTORS * 1000
    assert seconds(ADAPTER, WORK, "NONE", endless) == pytest.approx(plain / 1e9)
    assert seconds(ADAPTER, WORK, "FULL", endless) == pytest.approx((plain + layers + seen) / 1e9)
    reference = replace(ADAPTER, has_reference=True)
    assert seconds(reference, WORK, "NONE", endless) == pytest.approx((plain + layers + seen + head) / 1e9)
    whole = (layers + seen + 2 * layers + 2.5 * seen) / 1e9 + 3 * head / 1e8
    assert seconds(ALL, WORK, "NONE", endless) == pytest.approx(whole)
    update = 30 * WEIGHTS * 10 / 1e9
    assert seconds(ALL, WORK, "NONE", SPEED) == pytest.approx(whole + update)
    moving, moved = replace(SPEED, moves=3.0), 2 * (4 * 64 + 2 * 64 + 2 * 32 + 3 * 128) + 6 * 2 * 64 + 8 * 4
    kept = seconds(ALL, WORK, "NONE", moving) - whole - update
    assert kept == pytest.approx(3 * 10 * 1000 * moved / 1e9)
    again = seconds(ALL, WORK, "SELECTIVE", moving) - whole - update
    assert again == pytest.approx(kept * (1 + 0.7 / 3))


@pytest.mark.parametrize("precision", ["INT8", "NF4"])
def test_numbers_of_a_quantised_base_are_made_whole_on_a_gpu_and_where_operators_are_watched(
    precision: Precision,
) -> None:
    held = replace(ADAPTER, precision=precision)
    weights = {
        (kept, place): footprint(held, PASS, kept, place).weights
        for kept in CHECKPOINTINGS
        for place in ("CPU", "GPU")
    }
    least = weights["NONE", "CPU"]
    together = 2 * 2 * 64 * 128  # gate and up
    assert weights == {
        (kept, place): least + together * (place == "GPU" or kept == "SELECTIVE") for kept, place in weights
    }
    made = 2 * PRODUCTS * 2 * WORK.num_steps / 1e9
    writing = replace(SPEED, makes_numbers=True)
    for kept in CHECKPOINTINGS:
        more = seconds(held, WORK, kept, writing) - seconds(held, WORK, kept, SPEED)
        assert more == pytest.approx(0.0 if kept == "SELECTIVE" else made)


def test_drawing_an_answer_reads_all_weights_for_each_token() -> None:
    drawn = replace(WORK, num_drawn=300)
    more = seconds(ADAPTER, drawn, "NONE", SPEED) - seconds(ADAPTER, WORK, "NONE", SPEED)
    assert more == pytest.approx(2 * WEIGHTS * 300 / 1e9)


def test_a_peak_is_the_sum_of_what_is_there_at_once() -> None:
    found = Footprint(
        weights=1, adapters=2, gradients=4, optimiser=8, activations=16, logits=32, cache=40, runtime=64
    )
    assert found.peak == 1 + 2 + 4 + 8 + 64 + 48
    assert replace(found, cache=50).peak == 1 + 2 + 4 + 8 + 64 + 50


LAYER = PRODUCTS // 10 + 2 * 64
REST = 64_000 + 64
"""Weights of a layer, and of what is in none."""


@pytest.mark.parametrize("num_parts", [2, 8])
def test_ranks_that_divide_an_adapters_model_hold_a_part_and_some_layers(num_parts: int) -> None:
    divided = replace(ADAPTER, num_parts=num_parts)
    found = footprint(divided, PASS, "NONE")
    assert found.weights == 2 * WEIGHTS // num_parts + 2 * (4 * LAYER + REST)
    on_gpu = footprint(divided, PASS, "NONE", "GPU")
    assert found.weights - on_gpu.weights == 2 * LAYER, "what gloo puts a layer together in"
    assert (found.adapters, found.gradients, found.optimiser) == (
        4 * FACTORS // num_parts,
        4 * FACTORS // num_parts,
        8 * FACTORS // num_parts,
    )
    for kept in CHECKPOINTINGS:
        alone, each = (footprint(one, PASS, kept, "GPU").activations for one in (ADAPTER, divided))
        assert alone == each, "what a rank computes is its own"
    holes = footprint(ADAPTER, PASS, "FULL").activations - footprint(divided, PASS, "FULL").activations
    assert holes == pytest.approx(0.3 * 100 * 10 * 2 * (3 * 128 + 3 * 64), abs=1), (
        "what is freed is given back"
    )


def test_of_all_weights_the_parts_are_the_masters() -> None:
    found = footprint(replace(ALL, num_parts=4), PASS, "NONE")
    assert found.weights == 2 * (4 * LAYER + REST)
    assert found.gradients == WEIGHTS + 8 * max(LAYER, REST)
    assert found.optimiser == 3 * WEIGHTS
    kept = footprint(replace(ALL, num_parts=4, keeps_reference=True), PASS, "NONE")
    assert kept.weights - found.weights == 6 * WEIGHTS // 4


def test_answers_are_drawn_from_all_of_a_divided_model() -> None:
    drawn = replace(ADAPTER, num_samples=8, max_new_tokens=64)
    whole, parts = (footprint(replace(drawn, num_parts=number), PASS, "NONE") for number in (1, 2))
    assert parts.cache - whole.cache == 2 * WEIGHTS
