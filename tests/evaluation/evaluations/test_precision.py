"""What the base model of all arms is held in: said, or what their adapters were trained beside."""

from __future__ import annotations

import pytest
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.memory_peers import BASE, MORE, OTHER, TUNED

from luthier.errors import InvalidArgument
from luthier.v1.base_precision_pb2 import (
    BASE_PRECISION_BFLOAT16,
    BASE_PRECISION_INT8,
    BASE_PRECISION_NF4,
)
from luthier.v1.evaluation_pb2 import EvaluationArm

ARMS = [EvaluationArm(arm_id=name.rsplit("/", 1)[-1], model=name) for name in (BASE, TUNED, MORE)]


async def test_all_arms_are_asked_beside_what_the_adapter_was_trained_beside(bench: Bench) -> None:
    """The base model's own arm too: else what differs would be two things."""
    bench.peers.precisions[TUNED] = BASE_PRECISION_NF4
    made = await bench.create()
    assert made.base_precision == BASE_PRECISION_NF4
    _, spec = await bench.claim()
    assert spec.evaluate.evaluation.base_precision == BASE_PRECISION_NF4


async def test_what_is_said_wins_and_nothing_is_bfloat16(bench: Bench) -> None:
    bench.peers.precisions[TUNED] = BASE_PRECISION_NF4
    assert (await bench.create(base_precision=BASE_PRECISION_INT8)).base_precision == BASE_PRECISION_INT8
    await bench.cancel("projects/default/evaluations/e")
    await bench.service.family.delete("projects/default/evaluations/e", "")
    bench.peers.precisions.clear()
    assert (await bench.create()).base_precision == BASE_PRECISION_BFLOAT16


async def test_adapters_that_differ_in_it_are_refused_unless_it_is_said(bench: Bench) -> None:
    bench.peers.precisions[TUNED] = BASE_PRECISION_NF4
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(arms=ARMS)
    assert caught.value.message == (
        "evaluation.base_precision: must be set, as the arms' adapters were trained beside a base model that was held "
        "in different ways, and all arms are asked beside one; got tuned: NF4, more: BFLOAT16"
    )
    made = await bench.create(arms=ARMS, base_precision=BASE_PRECISION_BFLOAT16)
    assert made.base_precision == BASE_PRECISION_BFLOAT16
    bench.peers.precisions[MORE] = BASE_PRECISION_NF4


async def test_beside_another_base_an_adapter_of_a_quantised_one_needs_it_to_be_said(bench: Bench) -> None:
    """Else a model with all its weights would be asked in 4 bits, and nobody would have wanted that."""
    arms = [EvaluationArm(arm_id="tuned", model=TUNED), EvaluationArm(arm_id="whole", model=OTHER)]
    bench.peers.precisions[TUNED] = BASE_PRECISION_NF4
    with pytest.raises(InvalidArgument) as caught:
        await bench.create(arms=arms)
    assert caught.value.message == (
        "evaluation.base_precision: must be set, as arms stand on several base models, all of which are held alike, "
        "and an adapter was trained beside one that was held in another way than BFLOAT16; got tuned: NF4"
    )
    made = await bench.create(arms=arms, base_precision=BASE_PRECISION_NF4)
    assert made.base_precision == BASE_PRECISION_NF4


async def test_arms_on_several_bases_are_asked_in_bfloat16_where_nothing_else_was_trained(
    bench: Bench,
) -> None:
    arms = [EvaluationArm(arm_id="tuned", model=TUNED), EvaluationArm(arm_id="whole", model=OTHER)]
    assert (await bench.create(arms=arms)).base_precision == BASE_PRECISION_BFLOAT16
