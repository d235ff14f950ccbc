"""An adapter as PEFT has it, and what it has learnt."""

from __future__ import annotations

from typing import Any

import torch
from sft_step_loop import Adaptation
from sft_step_task import LORA, Learnt, Task
from torch import Tensor
from transformers import AutoModelForCausalLM


def peft_model(task: Task) -> Any:
    """The task's model in bf16 with its adapter in float32, as PEFT's own loading leaves it."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16, local_files_only=True)
    return PeftModel.from_pretrained(base, str(task.adapter), is_trainable=True)


def peft_learnt(model: Any) -> Learnt:
    """What a PeftModel has learnt."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, part, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if part:
            found.setdefault(module, {})[name.rpartition(".lora_")[2][0]] = parameter.detach()
    return merge_factors({module: (pair["A"], pair["B"]) for module, pair in found.items()})


def merge_factors(factors: dict[str, tuple[Tensor, Tensor]]) -> Learnt:
    """Merge an adapter, module name -> A [R, I] and B [O, R], into a model."""
    scale = LORA.alpha / LORA.rank

    def put(into: Any) -> None:
        for module, (a_RI, b_OR) in factors.items():
            into.get_submodule(module).weight += scale * (b_OR.float() @ a_RI.float())

    return put


ADAPTER_OF_PEFT = Adaptation(load=peft_model, learnt=peft_learnt)
