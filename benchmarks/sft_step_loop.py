"""The plain loop that a user of transformers writes, on the same packed rows, compiled or not, whatever trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sft_step_meter import Meter
from sft_step_task import MAX_GRAD_NORM, WEIGHT_DECAY, Learnt, Row, Task
from torch import Tensor
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What a peer trains.

    Attributes:
        load: returns the task's model, the parameters that train requiring gradients.
        learnt: returns what such a model has learnt.
    """

    load: Callable[[Task], Any]
    learnt: Callable[[Any], Learnt]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """How a plain loop runs.

    Attributes:
        compiled: whether the model is compiled.
        autocast: whether float32 weights compute in bfloat16.
        fused: whether AdamW is torch's fused one.
    """

    compiled: bool = False
    autocast: bool = False
    fused: bool = False


def whole_model(task: Task) -> Any:
    """The task's model with float32 weights, all of which train."""
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, local_files_only=True)


def whole_learnt(model: Any) -> Learnt:
    """What all weights of a model have learnt."""
    return put_weights({name: parameter.detach() for name, parameter in model.named_parameters()})


def put_weights(weights: dict[str, Tensor]) -> Learnt:
    """Put weights by name in place of a model's."""

    def put(into: Any) -> None:
        for name, parameter in into.named_parameters():
            parameter.copy_(weights[name])

    return put


WHOLE = Adaptation(load=whole_model, learnt=whole_learnt)


def packed_inputs(rows: list[Row]) -> dict[str, Tensor]:
    """Rows end to end as one row; positions that begin anew tell transformers to mask block by block."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
    }


def run_loop(task: Task, meter: Meter, loop: Loop, adaptation: Adaptation) -> Learnt:
    """Train in a plain loop; returns what was learnt."""
    model = adaptation.load(task)
    model.train()
    # Micro-batches differ in length: one graph for all of them instead of one each.
    forward = torch.compile(model, dynamic=True) if loop.compiled else model
    if loop.compiled and meter.is_profiling:
        # Else the generated kernels would not be told from the Python around them.
        inductor_config.cpp.enable_kernel_profile = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=task.learning_rate, weight_decay=WEIGHT_DECAY, fused=loop.fused or None
    )
    meter.begin()
    for step in task.steps():
        batches = [packed_inputs(rows) for rows in step]
        # A tensor, because a number would be compiled in.
        supervised = torch.stack([batch["labels"].ne(-100).sum() for batch in batches]).sum()
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.autocast):
                loss = forward(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimiser.step()
        optimiser.zero_grad()
        meter.losses.append(total)
        meter.step_done()
    return adaptation.learnt(model)
