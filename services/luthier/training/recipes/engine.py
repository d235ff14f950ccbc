"""A model, one of its adapters and the adapter's optimiser, driven step by step.

Knows nothing of data, schedules or files: a loop drives it, and so may anything else that makes batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import DataLoss
from luthier.lm.lora import activate, adapter_parameters
from luthier.lm.loss import supervised_loss
from luthier.lm.packed import PackedBatch

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")
# at::internal::GRAIN_SIZE: torch cuts a sum to one number among its threads from this size on.
_SERIAL_SUM = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """AdamW (arXiv:1711.05101) with betas 0.9 and 0.999; max_grad_norm 0 means no clipping."""

    weight_decay: float
    max_grad_norm: float


class Engine:
    """Trains one adapter of a model whose base weights stay as they are.

    Everything that it computes is bitwise the same in every run on one machine with the same settings: all
    tensors are visited in order of their names, and no sum to one number is divided among threads.
    """

    def __init__(self, model: PreTrainedModel, adapter: str, settings: OptimiserSettings) -> None:
        self._model = model
        self._settings = settings
        self._parameters = adapter_parameters(model, adapter)
        # The loop over single tensors: the fused one cuts tensors at places that depend on the thread count.
        self._optimiser = torch.optim.AdamW(
            self._parameters.values(),
            lr=0.0,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=settings.weight_decay,
            foreach=False,
            fused=False,
        )
        for parameter in self._parameters.values():
            # Also an adapted module that a batch does not pass through (an expert) is part of every step.
            parameter.grad = torch.zeros_like(parameter)
        # No dropout: the adapter has none, and the base has to compute what it was taught.
        model.train(mode=False)
        activate(model, adapter)

    def accumulate(self, batch: PackedBatch, step_supervised: int) -> float:
        """Add the gradient of one micro-batch of a step that learns `step_supervised` tokens in all.

        Returns the summed loss of the batch, in nats.
        """
        loss, _ = supervised_loss(self._model, batch)
        torch.autograd.backward(loss / step_supervised)
        return loss.item()

    def update(self, learning_rate: float) -> float:
        """Clip the gradients, change the adapter, forget the gradients; returns their norm before clipping.

        A norm that is not finite changes nothing.
        """
        norm = self._gradient_norm()
        if not math.isfinite(norm):
            self._optimiser.zero_grad(set_to_none=False)
            return norm
        limit = self._settings.max_grad_norm
        if limit and norm > limit:
            for parameter in self._parameters.values():
                assert parameter.grad is not None
                parameter.grad.mul_(limit / norm)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=False)
        return norm

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> tuple[float, int]:
        """Return the summed loss of a batch in nats, and the number of its learnt tokens."""
        loss, count = supervised_loss(self._model, batch)
        return loss.item(), count

    def optimiser_state(self) -> dict[str, Tensor]:
        """Return the moments as `<parameter>.exp_avg` and `.exp_avg_sq`; their memory is the engine's."""
        return {
            f"{name}.{moment}": self._optimiser.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        }

    def load_optimiser_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Continue with the moments that `optimiser_state` gave after `step` updates.

        Raises:
            DataLoss: tensors are missing, foreign or of another shape.
        """
        expected = {
            f"{name}.{moment}": parameter.shape
            for name, parameter in self._parameters.items()
            for moment in _MOMENTS
        }
        if {name: tensor.shape for name, tensor in tensors.items()} != expected:
            raise DataLoss("the optimiser state must hold both moments of every adapter tensor, and no other")
        for name, parameter in self._parameters.items():
            moments = {moment: tensors[f"{name}.{moment}"].clone() for moment in _MOMENTS}
            self._optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}

    def _gradient_norm(self) -> float:
        sums = []
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            by_row = parameter.grad.square().sum(dim=1)
            sums += [part.sum() for part in torch.split(by_row, _SERIAL_SUM // 2)]
        # From a GPU in one piece: a transfer for each would wait for each.
        squares = torch.stack(sums).tolist()
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan
