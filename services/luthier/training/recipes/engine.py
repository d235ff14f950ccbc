"""Weights and their optimiser, driven step by step.

Knows nothing of data, schedules, files or methods: a loop drives it, and so may anything else that makes batches. What
is taken from a forward pass is a readout, what is learnt from that an objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from luthier.errors import DataLoss, Reason, Unavailable
from luthier.lm.packed import PackedBatch
from luthier.lm.readouts import Readout, ReadT, read
from luthier.training.recipes.collective import Collective, OneRank
from luthier.training.recipes.masters import pieces
from luthier.training.recipes.moments import MOMENTS, HeldAdamW, States, fresh, parts_of
from luthier.training.recipes.phases import PhaseClock
from luthier.training.recipes.position import Mark
from luthier.training.recipes.weights import Weights

T = TypeVar("T")
BETAS = (0.9, 0.999)
EPSILON = 1e-8
# at::internal::GRAIN_SIZE: torch cuts a sum to one number among its threads from this size on.
_SERIAL_SUM = 32768


class Sum(NamedTuple):
    """A scalar, and the count that divides it: that of the whole step, over all micro-batches and ranks.

    One without a gradient is measured and not learnt.
    """

    total: Tensor
    divisor: float


Objective = Callable[[ReadT, PackedBatch], Mapping[str, Sum]]
"""What a readout gave of a batch -> sums by name; what is minimised is the sum of total / divisor over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """AdamW (arXiv:1711.05101) with betas 0.9 and 0.999; max_grad_norm 0 means no clipping; `states` are its moments.

    Weights decay, vectors do not: a norm's scale or a bias that shrinks changes what a layer computes, and regularises
    nothing. So have it transformers' Trainer and Megatron-LM; torchtune and torchtitan let all decay.
    """

    weight_decay: float
    max_grad_norm: float
    states: States = "FLOAT32"


def optimiser_kernel(device: torch.device) -> Literal["fused", "single_tensors"]:
    """Return what changes the weights: on processors one pass over all that belongs to a weight, else torch's loop.

    The fused one cuts a tensor among threads at lines of a cache, so at whole vectors: its bits do not depend on their
    number.
    """
    return "fused" if device.type == "cpu" else "single_tensors"


class Engine:
    """Trains weights of a model, which is on `device`, where each batch is taken.

    Everything that it computes is bitwise the same in every run on one machine with the same settings and number of
    ranks: all tensors are visited in order of their names, and no sum to one number is divided among threads.
    `collective` are the ranks, each with an engine of the same weights and batches of its own; None: this one alone. Of
    a model that is divided among them each has its parts, and all make every pass together, one without gradients too.
    `clock` is told by who drives it what its time is spent on; `mark` notes the rows of each pass.
    """

    def __init__(
        self,
        weights: Weights,
        settings: OptimiserSettings,
        device: torch.device,
        collective: Collective | None = None,
    ) -> None:
        self.weights = weights
        self.collective = collective or OneRank()
        self.clock = PhaseClock()
        self.mark = Mark()
        self._settings = settings
        self._device = device
        self._num_updates = 0
        self._optimiser = _optimiser_of(weights, settings, device)
        # None of transformers' own dropout: the base has to compute what it was taught.
        weights.model.train(mode=False)

    def accumulate(
        self, batch: PackedBatch, readout: Readout[ReadT], objective: Objective[ReadT]
    ) -> dict[str, float]:
        """Add the gradient of one micro-batch of a step; returns the totals of the objective's sums, undivided.

        The one pass that has the weights' dropout, by the number of updates made so far. Layers may compute again what
        they did not keep (`lm.checkpointing`). A batch that does not count has totals and gradients of zero.
        """
        placed = self._placed(batch)
        # Until the gradient is there: what is computed again must drop the same.
        with self.weights.dropping(placed, self._num_updates):
            sums = objective(self._read(placed, readout), placed)
            loss = reduce(add, [one.total / one.divisor for one in sums.values()])
            torch.autograd.backward(loss if batch.counts else loss * 0.0)
        return _totals(sums, batch)

    def _placed(self, batch: PackedBatch) -> PackedBatch:
        self.mark.at(batch.rows)
        return batch.to(self._device)

    def _read(self, batch: PackedBatch, readout: Readout[ReadT]) -> ReadT:
        shards = self.weights.shards
        return read(self.weights.model, batch, readout) if shards is None else shards.read(batch, readout)

    def with_whole_weights(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, in which this rank makes passes of the model that no other need make.

        All ranks call it. Of a divided model that takes the memory of all of it.
        """
        shards = self.weights.shards
        return work() if shards is None else shards.alone(work)

    def forget(self) -> None:
        """Forget what was accumulated since the last update, also by a pass that broke off before its end.

        One of a divided model that broke off ends the run.
        """
        self._optimiser.zero_grad(set_to_none=False)
        if self.weights.shards is not None:
            return
        trained = {id(parameter) for parameter in self.weights.parameters.values()}
        for weight in self.weights.model.parameters():
            if id(weight) not in trained:
                weight.grad = None

    @torch.no_grad()
    def measure(
        self, batch: PackedBatch, readout: Readout[ReadT], objective: Objective[ReadT]
    ) -> dict[str, float]:
        """Return the totals of the objective's sums over a batch, undivided, without gradients."""
        placed = self._placed(batch)
        return _totals(objective(self._read(placed, readout), placed), batch)

    @torch.no_grad()
    def score(self, batch: PackedBatch, readout: Readout[ReadT]) -> ReadT:
        """Return what a readout takes from a batch, without gradients."""
        return self._read(self._placed(batch), readout)

    def update(self, learning_rate: float) -> float:
        """Clip the gradients, change the weights, forget the gradients; returns their norm before clipping.

        A norm that is not finite changes nothing.
        """
        parts, own = self._gradients()
        self.collective.sum_gradients(own)
        gradients = [*parts, *own]
        norm = self._norm(parts, own)
        if not math.isfinite(norm):
            self._optimiser.zero_grad(set_to_none=False)
            return norm
        limit = self._settings.max_grad_norm
        if limit and norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / norm)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate * group["rate"]
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=False)
        self.weights.publish()
        self._num_updates += 1
        return norm

    def require_same_weights(self) -> None:
        """Check that all ranks have made the same weights of the same sums, to the bit.

        Of what is divided each part is one rank's: compared is what all have, and how many updates they made.

        Raises:
            Unavailable: RANKS_DIVERGED, a rank computes what others do not.
        """
        if self.collective.num_ranks == 1:
            return
        sums = [
            one.detach().view(torch.int32).sum(dtype=torch.int64)
            for name, one in self.weights.parameters.items()
            if name not in self.weights.divided
        ]
        found = self.collective.gathered((self._num_updates, torch.stack(sums).tolist() if sums else []))
        differing = [rank for rank, one in enumerate(found) if one != found[0]]
        if differing:
            raise Unavailable(
                f"all ranks must have the same weights after update {self._num_updates}, those of {differing} differ "
                "from the first one's: their processors or libraries do not compute the same",
                reason=Reason.RANKS_DIVERGED,
                metadata={"ranks": ",".join(map(str, differing))},
            )

    def optimiser_state(self) -> dict[str, Tensor]:
        """Return the moments as `<parameter>.exp_avg` and `.exp_avg_sq`; their memory is the engine's.

        Of 8 bits they are two tensors each, with `.codes` and `.scale` behind that name. Before the first update they
        are zeros, of which the engine has none yet.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.weights.parameters.items():
            state = self._optimiser.state[parameter] or fresh(parameter, self._settings.states)
            for moment in MOMENTS:
                found |= parts_of(f"{name}.{moment}", state[moment])
        return found

    def load_optimiser_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue with the moments that `optimiser_state` gave after `step` updates.

        Raises:
            DataLoss: tensors are missing, foreign or of another shape or type.
        """
        states = self._settings.states
        begun = {name: fresh(parameter, states) for name, parameter in self.weights.parameters.items()}
        into: dict[str, Tensor] = {}
        for name, moments in begun.items():
            for moment, value in moments.items():
                into |= parts_of(f"{name}.{moment}", value)
        if _forms(tensors) != _forms(into):
            raise DataLoss("the optimiser state must hold both moments of every trained tensor, and no other")
        for name, tensor in into.items():
            tensor.copy_(tensors[name])
        for name, parameter in self.weights.parameters.items():
            self._optimiser.state[parameter] = {"step": torch.tensor(float(step)), **begun[name]}
        self._num_updates = step

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return those of parts, which come summed over the ranks, and those of this rank's own passes."""
        parts: list[Tensor] = []
        own: list[Tensor] = []
        for name, parameter in self.weights.parameters.items():
            assert parameter.grad is not None, f"{name} has lost its gradient"
            (parts if name in self.weights.divided else own).append(parameter.grad)
        return parts, own

    def _norm(self, parts: list[Tensor], whole: list[Tensor]) -> float:
        """Return the norm of all gradients together, of which the ranks have parts; NaN where one is not finite."""
        here = _square(whole)
        if parts:
            (of_parts,) = self.collective.sum_counts([_square(parts)])
            here += of_parts
        return math.sqrt(here)


def _totals(sums: Mapping[str, Sum], batch: PackedBatch) -> dict[str, float]:
    return {name: one.total.item() if batch.counts else 0.0 for name, one in sums.items()}


def _square(gradients: list[Tensor]) -> float:
    """Return the squared norm of gradients together; NaN where one is not finite."""
    sums = []
    for gradient in gradients:
        by_row = gradient.square() if gradient.dim() < 2 else _squares(gradient)
        sums += [part.sum() for part in torch.split(by_row, _SERIAL_SUM // 2)]
    # From a GPU in one piece: a transfer for each would wait for each.
    found = torch.stack(sums).tolist() if sums else []
    return math.fsum(found) if all(map(math.isfinite, found)) else math.nan


def _optimiser_of(
    weights: Weights, settings: OptimiserSettings, device: torch.device
) -> torch.optim.Optimizer:
    groups = _groups(weights, settings.weight_decay)
    is_fused = optimiser_kernel(device) == "fused"
    if settings.states != "FLOAT32":
        return HeldAdamW(groups, settings.states, BETAS, EPSILON, is_fused=is_fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, foreach=False, fused=is_fused)


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _squares(gradient: Tensor) -> Tensor:
    """Return the sum of squares of each row of a gradient of two dimensions or more."""
    return torch.cat([rows.square().flatten(1).sum(dim=1) for rows in pieces(gradient)])


def _groups(weights: Weights, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters by what their learning rate is multiplied by, and whether they decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, one in weights.parameters.items():
        decay = weight_decay if one.dim() > 1 else 0.0
        groups.setdefault((weights.rates.get(name, 1.0), decay), []).append(one)
    return [{"params": part, "weight_decay": decay, "rate": rate} for (rate, decay), part in groups.items()]
