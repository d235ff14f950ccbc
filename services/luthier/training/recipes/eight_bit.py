"""AdamW whose moments have 8 bits between updates (arXiv:2110.02861), where weights are many enough to be worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from luthier.kernels.adamw_8bit import Rates, adamw_8bit, fresh_moments
from luthier.training.recipes.footprint import has_8_bits

MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh_8_bits(parameter: Tensor) -> dict[str, Tensor]:
    """Return both moments of a parameter before the first update."""
    if has_8_bits(parameter.numel()):
        return dict(zip(MOMENTS, fresh_moments(parameter.detach()), strict=True))
    return {moment: torch.zeros_like(parameter) for moment in MOMENTS}


def parts_of(name: str, moment: Tensor) -> dict[str, Tensor]:
    """Return what a moment is made of by name, in its own memory: itself, or codes and scales."""
    held: Any = moment
    if hasattr(held, "codes"):
        return {f"{name}.codes": held.codes, f"{name}.scale": held.scale}
    return {name: moment}


class EightBitAdamW(torch.optim.Optimizer):
    """As torch's AdamW, which it is where moments are float32."""

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        betas: tuple[float, float],
        epsilon: float,
        *,
        is_fused: bool,
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0}
        super().__init__([dict(group) for group in groups], defaults)
        self._betas = betas
        self._epsilon = epsilon
        self._is_fused = is_fused

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change all weights by their gradients."""
        assert closure is None, "an engine has made the gradients"
        for group in self.param_groups:
            for parameter in group["params"]:
                self._change(parameter, group["lr"], group["weight_decay"])

    def _change(self, parameter: Tensor, learning_rate: float, weight_decay: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(step=torch.tensor(0.0), **fresh_8_bits(parameter))
        mean, square = (state[moment] for moment in MOMENTS)
        if has_8_bits(parameter.numel()):
            state["step"] += 1
            rates = Rates(
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                betas=self._betas,
                epsilon=self._epsilon,
                number=int(state["step"]),
            )
            adamw_8bit(parameter.data, parameter.grad, (mean, square), rates)
            return
        adamw(
            [parameter],
            [parameter.grad],
            [mean],
            [square],
            [],
            [state["step"]],
            foreach=False,
            fused=self._is_fused,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self._epsilon,
            maximize=False,
        )
