"""The engine equals plain loops in torch, whatever weights, readout and number of ranks it drives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from luthier.kernels.linear_cross_entropy import LossSum
from luthier.lm.lora import LoraSpec, insert_lora
from luthier.lm.packed import WEIGHT, PackedBatch, pack
from luthier.lm.readouts import FusedLoss, TokenLogprobs, TokenScores
from luthier.training.recipes import engine as recipe_engine
from luthier.training.recipes.collective import OneRank
from luthier.training.recipes.engine import Engine, OptimiserSettings, Sum
from luthier.training.recipes.masters import mastered, pieces
from luthier.training.recipes.objectives import supervised
from luthier.training.recipes.weights import Adapter

ModelMaker = Callable[..., PreTrainedModel]
RATES = (2e-3, 5e-3, 5e-3, 4e-3, 1e-3)
OPTIMISER = OptimiserSettings(weight_decay=0.01, max_grad_norm=0.5)
CPU = torch.device("cpu")


@pytest.fixture
def batches(token_rows: Callable[..., list[Any]]) -> list[list[PackedBatch]]:
    """Five steps of two micro-batches of three rows."""
    rows = token_rows(30)
    return [[batch_of(rows[at : at + 3]) for at in (start, start + 3)] for start in range(0, 30, 6)]


def batch_of(rows: Sequence[Any]) -> PackedBatch:
    return pack([row.input_ids for row in rows], {WEIGHT: [row.loss_mask for row in rows]})


def learnt(step: Sequence[PackedBatch]) -> int:
    return sum(int(batch.streams[WEIGHT].sum()) for batch in step)


def adapter_engine(model: PreTrainedModel, collective: Any = None) -> Engine:
    insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
    return Engine(Adapter(model, "default", base_model="tiny"), OPTIMISER, CPU, collective)


def trained(engine: Engine, batches: Sequence[Sequence[PackedBatch]]) -> list[float]:
    """Losses of all steps."""
    losses = []
    for step, rate in zip(batches, RATES, strict=True):
        sums = [engine.accumulate(batch, FusedLoss(), supervised(learnt(step))) for batch in step]
        losses.append(sum(one["train_loss"] for one in sums) / learnt(step))
        engine.update(rate)
    return losses


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_second_factors_learn_at_their_own_rate(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], ratio: float
) -> None:
    """The first step of AdamW moves each number by the rate."""
    model = tiny_llama()
    insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
    weights = Adapter(model, "default", base_model="tiny")
    weights.hasten(ratio)
    with torch.no_grad():
        for name, parameter in weights.parameters.items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    before = {name: parameter.detach().clone() for name, parameter in weights.parameters.items()}
    engine = Engine(weights, OptimiserSettings(weight_decay=0.0, max_grad_norm=0.0), CPU)
    engine.accumulate(batches[0][0], FusedLoss(), supervised(learnt(batches[0])))
    engine.update(1e-3)
    for name, parameter in weights.parameters.items():
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * (ratio if name.endswith("lora_B") else 1.0), rel=0.02), name


class PlainLora(nn.Module):
    """What a LoRA layer is, in one line of torch."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = x @ self.a.T @ self.b.T * self.scale
        output: torch.Tensor = self.linear(x)
        return output + update


def plain_adapter(model: PreTrainedModel, like: Adapter) -> dict[str, nn.Parameter]:
    """Put the adapter's first values into a model that has only transformers' own modules."""
    model.requires_grad_(requires_grad=False)
    parameters = {name: nn.Parameter(one.detach().clone()) for name, one in like.parameters.items()}
    whole = {name: one for name, one in model.named_parameters() if name in parameters}
    for one in whole.values():
        one.requires_grad_()
    parameters |= whole
    for name in {key.rpartition(".")[0] for key in parameters.keys() - whole.keys()}:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        a, b = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
        model.set_submodule(name, PlainLora(linear, a, b, 8.0 / 4))
    return parameters


def plain_training(
    model: Any, parameters: Sequence[nn.Parameter], batches: Sequence[Sequence[PackedBatch]]
) -> list[float]:
    """A loop as anybody would write it: each row alone, torch's loss, clipping and AdamW."""
    groups = [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": 0.01},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step, rate in zip(batches, RATES, strict=True):
        total = torch.zeros(())
        for batch in step:
            for ids, weight in zip(
                *(rows_of(batch, one) for one in (batch.input_ids, batch.streams[WEIGHT])), strict=True
            ):
                labels = ids.masked_fill(weight == 0, -100)[1:]
                logits = model(input_ids=ids[None]).logits[0, :-1]
                total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss = total / learnt(step)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad()
    return losses


def rows_of(batch: PackedBatch, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[a:b] for a, b in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].detach(), tensor.detach(), rtol=1e-2, atol=2e-4)


def test_steps_on_an_adapter_equal_a_plain_loop(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    engine = adapter_engine(tiny_llama())
    assert isinstance(engine.weights, Adapter)
    plain = tiny_llama(attention="eager")
    parameters = plain_adapter(plain, engine.weights)
    assert trained(engine, batches) == pytest.approx(
        plain_training(plain, list(parameters.values()), batches), rel=1e-4
    )
    assert_close(engine.weights.parameters, parameters)


def test_an_objective_over_log_probabilities_trains_as_the_fused_loss(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    """After five steps every weight is within 2e-4, the losses within 1e-5 of their size."""
    fused, general = adapter_engine(tiny_llama()), adapter_engine(tiny_llama())

    def negative_logprob(divisor: int) -> Any:
        def objective(found: TokenScores, batch: PackedBatch) -> dict[str, Sum]:
            weight = batch.streams[WEIGHT][found.position + 1]
            return {"train_loss": Sum(-(found.logprob * weight).sum(), divisor)}

        return objective

    wanted = trained(fused, batches)
    losses = []
    for step, rate in zip(batches, RATES, strict=True):
        objective = negative_logprob(learnt(step))
        sums = [general.accumulate(batch, TokenLogprobs(), objective) for batch in step]
        losses.append(sum(one["train_loss"] for one in sums) / learnt(step))
        general.update(rate)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert_close(general.weights.parameters, fused.weights.parameters)


def test_sums_are_divided_each_by_its_own_count_and_one_without_gradient_is_only_measured(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    engine, halves = adapter_engine(tiny_llama()), adapter_engine(tiny_llama())
    batch = batches[0][0]

    def objective(found: LossSum, _: PackedBatch) -> dict[str, Sum]:
        return {
            "one": Sum(found.loss_sum, 4),
            "other": Sum(found.loss_sum * 3, 12),
            "measured": Sum(found.loss_sum.detach() * 7, 1),
        }

    sums = engine.accumulate(batch, FusedLoss(), objective)
    assert sums["other"] == pytest.approx(3 * sums["one"])
    assert sums["measured"] == pytest.approx(7 * sums["one"])
    halves.accumulate(batch, FusedLoss(), supervised(2))
    for name, parameter in engine.weights.parameters.items():
        torch.testing.assert_close(parameter.grad, halves.weights.parameters[name].grad, rtol=1e-5, atol=1e-7)


def test_score_is_the_readout_without_gradients(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    engine = adapter_engine(tiny_llama())
    scores = engine.score(batches[0][0], TokenLogprobs())
    loss = engine.score(batches[0][0], FusedLoss())
    assert not scores.logprob.requires_grad
    assert not loss.loss_sum.requires_grad
    assert -scores.logprob.sum().item() == pytest.approx(loss.loss_sum.item(), rel=1e-5)
    assert all(one.grad is not None and not one.grad.any() for one in engine.weights.parameters.values())


class Threads:
    """Two ranks of one process that meet at a barrier; each asks for the same sums in the same order."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._slots: dict[int, Any] = {}

    def rank(self, number: int) -> Any:
        return RankOfThreads(self, number)

    def exchange(self, number: int, value: Any) -> list[Any]:
        self._slots[number] = value
        self._barrier.wait()
        values = [self._slots[one] for one in (0, 1)]
        self._barrier.wait()
        return values


class RankOfThreads(OneRank):
    """One of them. Gradients are held whole by both, so that squares of norms are not summed."""

    def __init__(self, threads: Threads, number: int) -> None:
        self._threads = threads
        self._number = number

    def sum_counts(self, values: Sequence[float]) -> list[float]:
        return [
            sum(column) for column in zip(*self._threads.exchange(self._number, list(values)), strict=True)
        ]

    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        copies = [gradient.clone() for gradient in gradients]
        for gradient, *both in zip(gradients, *self._threads.exchange(self._number, copies), strict=True):
            gradient.copy_(both[0] + both[1])


def test_two_ranks_with_half_of_the_passes_each_make_the_steps_of_one(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]]
) -> None:
    alone = adapter_engine(tiny_llama())
    losses = trained(alone, batches)
    threads = Threads()
    engines = [adapter_engine(tiny_llama(), threads.rank(number)) for number in (0, 1)]
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        found[number] = []
        for step, rate in zip(batches, RATES, strict=True):
            objective = supervised(learnt(step))
            sums = engines[number].accumulate(step[number], FusedLoss(), objective)
            (total,) = engines[number].collective.sum_counts([sums["train_loss"]])
            found[number].append(total / learnt(step))
            engines[number].update(rate)

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == pytest.approx(losses, rel=1e-5)
    for name, parameter in engines[0].weights.parameters.items():
        assert torch.equal(parameter, engines[1].weights.parameters[name])
    assert_close(engines[0].weights.parameters, alone.weights.parameters)


def test_batches_are_taken_on_the_device_of_the_engine(
    tiny_llama: ModelMaker, batches: list[list[PackedBatch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    insert_lora(model, LoraSpec(rank=4, alpha=8.0), seed=11)
    engine = Engine(Adapter(model, "default", base_model="tiny"), OPTIMISER, torch.device("meta"))
    monkeypatch.setattr("luthier.training.recipes.engine.read", lambda model, batch, readout: batch)
    taken: Any = engine.score(batches[0][0], FusedLoss())
    assert taken.input_ids.device.type == taken.streams[WEIGHT].device.type == "meta"


class Bare:
    """Weights without a model that computes: what an optimiser changes, and nothing else."""

    rates: Mapping[str, float] = MappingProxyType({})
    shards = None
    divided: Mapping[str, torch.Tensor] = MappingProxyType({})

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.model: Any = nn.Module()

    def publish(self) -> None:
        pass


def updated(threads: int) -> dict[str, torch.Tensor]:
    """Odd sizes after some updates made by so many threads."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (1701, 333), "b": (16, 3), "c": (65537,), "d": (1,)}
    weights: Any = Bare(
        {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in shapes.items()}
    )
    engine = Engine(weights, OPTIMISER, CPU)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rate in RATES:
            for parameter in weights.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            engine.update(rate)
    finally:
        torch.set_num_threads(before)
    return {**weights.parameters, **engine.optimiser_state()}


def test_pieces_change_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pieces(torch.zeros(1701, 333))) > 1
    cut = updated(2)
    monkeypatch.setattr(recipe_engine, "pieces", lambda tensor: [tensor])
    for name, found in updated(2).items():
        assert torch.equal(found, cut[name]), name


@pytest.mark.parametrize("shape", [(1701, 333), (300_001,), (3, 5, 7)])
def test_a_master_adds_up_gradients_of_another_type(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    master = mastered(weight)
    master.grad = torch.zeros(shape)
    passes = [torch.randn(shape, generator=generator).bfloat16() for _ in range(3)]
    for one in passes:
        (weight * one).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is None
    assert torch.equal(master.grad, passes[0].float() + passes[1].float() + passes[2].float())


def test_an_update_has_the_same_bits_with_any_number_of_threads() -> None:
    one = updated(1)
    for threads in (2, 3, 5):
        for name, found in updated(threads).items():
            assert torch.equal(found, one[name]), f"{name} with {threads} threads"
