"""What tests ask of an engine, and what becomes of it."""

from typing import Any

import torch

from luthier.lm.generate import GenerationRequest
from luthier.lm.lora import LoraSpec, adapter_parameters, insert_lora

PROMPTS = ((5, 9, 11, 40, 3), (8,), (17, 21, 4, 60, 61, 62, 7, 9), (90, 1, 33))


def request(request_id: str = "r", **changes: Any) -> Any:
    settings: dict[str, Any] = {"request_id": request_id, "prompts": PROMPTS, "max_new_tokens": 12}
    return GenerationRequest(**(settings | changes))


def collect(events: Any, answers: Any, reasons: Any) -> None:
    for event in events:
        key = (event.request_id, event.row)
        answers.setdefault(key, []).extend(event.token_ids)
        assert event.num_generated == len(answers[key])
        if event.finish_reason is not None:
            assert key not in reasons
            reasons[key] = event.finish_reason


def run(engine: Any, *requests: GenerationRequest) -> Any:
    for one in requests:
        engine.submit(one)
    answers: dict[Any, Any] = {}
    reasons: dict[Any, Any] = {}
    while engine.wait(0):
        collect(engine.step(), answers, reasons)
    assert answers.keys() == reasons.keys()
    return answers, reasons


def with_adapter(model: Any, name: str, seed: int) -> None:
    insert_lora(model, LoraSpec(rank=4, alpha=8), seed=seed, name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, name).values():
        parameter.data.normal_(std=0.3, generator=generator)
