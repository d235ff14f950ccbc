"""The plain loop that a user of transformers and PEFT writes, on the same packed rows, compiled or not."""

from __future__ import annotations

from typing import Any

import torch
from sft_step_meter import Meter
from sft_step_task import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Row, Task
from torch import Tensor
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module name -> A [R, I] and B [O, R]."""


def peft_model(task: Task) -> Any:
    """The task's model in bf16 with its adapter in float32, as PEFT's own loading leaves it."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16, local_files_only=True)
    return PeftModel.from_pretrained(base, str(task.adapter), is_trainable=True)


def peft_factors(model: Any) -> Factors:
    """What a PeftModel has learnt."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, part, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if part:
            found.setdefault(module, {})[name.rpartition(".lora_")[2][0]] = parameter.detach()
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def packed_inputs(rows: list[Row]) -> dict[str, Tensor]:
    """Rows end to end as one row; positions that begin anew tell transformers to mask block by block."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "labels": torch.tensor([[label for row in rows for label in row.labels]]),
    }


def run_peft(task: Task, meter: Meter, *, compiled: bool) -> Factors:
    """Train in a plain loop; returns the adapter."""
    model = peft_model(task)
    model.train()
    # Micro-batches differ in length: one graph for all of them instead of one each.
    forward = torch.compile(model, dynamic=True) if compiled else model
    if compiled and meter.is_profiling:
        # Else the generated kernels would not be told from the Python around them.
        inductor_config.cpp.enable_kernel_profile = True
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    meter.begin()
    for step in task.steps():
        batches = [packed_inputs(rows) for rows in step]
        # A tensor, because a number would be compiled in.
        supervised = torch.stack([batch["labels"].ne(-100).sum() for batch in batches]).sum()
        total = 0.0
        for batch in batches:
            loss = forward(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learnt, MAX_GRAD_NORM)
        optimiser.step()
        optimiser.zero_grad()
        meter.losses.append(total)
        meter.step_done()
    return peft_factors(model)
