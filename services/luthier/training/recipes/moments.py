"""AdamW whose moments are held otherwise than torch's holds them: in 8 bits, or in main memory beside a GPU.

torchao has an optimiser for the latter (`CPUOffloadOptimizer`). It sends each gradient to main memory as soon as a pass
has made it: before ranks have summed it, before its norm is known, and by whether it is finite at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from luthier.kernels.adamw_8bit import Rates, adamw_8bit, fresh_moments
from luthier.training.recipes.footprint import has_8_bits

States = Literal["FLOAT32", "INT8", "OFFLOADED"]
"""What moments are: as torch's; codes of 8 bits (arXiv:2110.02861) of large tensors; float32 in main memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh(parameter: Tensor, states: States) -> dict[str, Tensor]:
    """Return both moments of a parameter before the first update."""
    if states == "INT8" and has_8_bits(parameter.numel()):
        return dict(zip(MOMENTS, fresh_moments(parameter.detach()), strict=True))
    if states != "OFFLOADED":
        return {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    # Pinned, else a copy would wait for the system to find each page.
    is_pinned = parameter.device.type == "cuda"
    return {
        moment: torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu", pin_memory=is_pinned)
        for moment in MOMENTS
    }


def parts_of(name: str, moment: Tensor) -> dict[str, Tensor]:
    """Return what a moment is made of by name, in its own memory: itself, or codes and scales."""
    held: Any = moment
    if hasattr(held, "codes"):
        return {f"{name}.codes": held.codes, f"{name}.scale": held.scale}
    return {name: moment}


class HeldAdamW(torch.optim.Optimizer):
    """As torch's AdamW, tensor by tensor, of moments that are held as `states` says.

    Where they are float32 it has the bits of torch's. Moments in main memory are on the device for the length of their
    tensor's update: 16 bytes a weight go over the bus, and no others are there meanwhile than that tensor's.
    """

    def __init__(
        self,
        groups: Iterable[Mapping[str, Any]],
        states: States,
        betas: tuple[float, float],
        epsilon: float,
        *,
        is_fused: bool,
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0}
        super().__init__([dict(group) for group in groups], defaults)
        self._states = states
        self._betas = betas
        self._epsilon = epsilon
        self._is_fused = is_fused

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # torch's returns a loss
        """Change all weights by their gradients."""
        assert closure is None, "an engine has made the gradients"
        device = None
        for group in self.param_groups:
            for parameter in group["params"]:
                self._change(parameter, group["lr"], group["weight_decay"])
                device = parameter.device
        if self._states == "OFFLOADED" and device is not None and device.type == "cuda":
            # Whoever reads moments in main memory must find those of this update.
            torch.cuda.current_stream(device).synchronize()

    def _change(self, parameter: Tensor, learning_rate: float, weight_decay: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state.update(step=torch.tensor(0.0), **fresh(parameter, self._states))
        kept = [state[moment] for moment in MOMENTS]
        if self._states == "INT8" and has_8_bits(parameter.numel()):
            state["step"] += 1
            rates = Rates(
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                betas=self._betas,
                epsilon=self._epsilon,
                number=int(state["step"]),
            )
            adamw_8bit(parameter.data, parameter.grad, (kept[0], kept[1]), rates)
            return
        # Of one stream: what is sent back has been changed, and its memory is not another's before it is sent.
        mean, square = (_sent(moment, parameter.device) for moment in kept)
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
        for moment, changed in zip(kept, (mean, square), strict=True):
            if changed is not moment:
                moment.copy_(changed, non_blocking=True)


def _sent(moment: Tensor, device: torch.device) -> Tensor:
    return moment.to(device, non_blocking=True)
