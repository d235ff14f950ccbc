"""What TRL's own trainers make of the cases: `python -m tests.training.recipes.trl_numbers` writes them down.

It needs the extra `bench` (trl 1.16). The file is committed, so that every run of the tests compares with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from tests.training.recipes.trl_cases import (
    ALPHA,
    ANSWERS,
    CASES,
    NUMBERS,
    PAIRS,
    RANK,
    Pair,
    adapter_values,
    fingerprints,
    pairs_of,
    tiny_model,
)
from tests.training.recipes.trl_rollouts import LOSSES, rollouts_of
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from luthier.training.recipes.objectives import Dpo, Ipo, Kto, Orpo, PairwiseReward, Simpo
from luthier.training.recipes.policy import Grpo


def numbers_of_trl(name: str, pairs: list[Pair] | None = None) -> dict[str, Any]:
    """Return a case's loss and the fingerprints of its gradients, as TRL has them, on its own pairs or on others."""
    with tempfile.TemporaryDirectory() as folder:
        method = CASES[name]
        makers: dict[type, Callable[..., tuple[Any, Tensor]]] = {
            Dpo: _dpo,
            Ipo: _dpo,
            Orpo: _orpo,
            Simpo: _simpo,
            Kto: _kto,
            PairwiseReward: _reward,
        }
        model, loss = makers[type(method)](folder, method, pairs or pairs_of(name))
        torch.autograd.backward(loss)
    gradients = {_our_name(key): one.grad for key, one in model.named_parameters() if one.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.item(), "gradients": fingerprints(gradients)}


def _our_name(key: str) -> str:
    inner = key.removeprefix("base_model.model.")
    if inner.startswith("score."):
        return "score.weight"
    return inner.removesuffix(".default.weight")


def _set_adapter(model: Any) -> None:
    trained = {_our_name(key): one for key, one in model.named_parameters() if one.requires_grad}
    values = adapter_values({key: one.shape for key, one in trained.items()})
    with torch.no_grad():
        for key, one in trained.items():
            one.copy_(values[key])


def _options(folder: str, **more: Any) -> dict[str, Any]:
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return {"output_dir": folder, "disable_dropout": True, **plain, **more}


def _given(columns: dict[str, list[Any]], task_type: str = "CAUSAL_LM") -> dict[str, Any]:
    """What every trainer is constructed with; its dataset is not looked at again."""
    datasets: Any = import_module("datasets")
    peft: Any = import_module("peft")

    words = {f"w{number}": number for number in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w96"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with_words: Any = PreTrainedTokenizerFast
    extra = {"modules_to_save": ["score"]} if task_type == "SEQ_CLS" else {}
    return {
        "train_dataset": datasets.Dataset.from_dict(columns),
        "processing_class": with_words(
            tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2"
        ),
        "peft_config": peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=task_type, **extra
        ),
    }


_PAIR_COLUMNS = {"prompt": ["w5", "w6"], "chosen": ["w7", "w8"], "rejected": ["w9", "w10"]}


def _padded(rows: list[list[int]], value: int = 0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _masked(rows: list[tuple[list[int], list[int]]], prefix: str = "") -> dict[str, Tensor]:
    """Prompts with answers as DPO and KTO want them."""
    return {
        f"{prefix}input_ids": _padded([prompt + answer for prompt, answer in rows]),
        f"{prefix}attention_mask": _padded([[1] * len(prompt + answer) for prompt, answer in rows]),
        f"{prefix}completion_mask": _padded(
            [[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]
        ),
    }


def _sides(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """All chosen sequences, then all rejected ones."""
    return [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, other) for prompt, _, other in pairs]


def _dpo(folder: str, method: Dpo | Ipo, pairs: list[Pair]) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl")

    kinds, weights, smoothing = ["ipo"], [1.0], 0.0
    if isinstance(method, Dpo):
        smoothing = method.label_smoothing
        kinds = ["robust" if smoothing else "sigmoid"]
    if method.nll_weight:
        kinds, weights = [*kinds, "sft"], [1.0, method.nll_weight]
    config = trl.DPOConfig(
        **_options(folder),
        beta=method.beta,
        loss_type=kinds,
        loss_weights=weights,
        label_smoothing=smoothing,
        max_length=None,
    )
    trainer = trl.DPOTrainer(model=tiny_model("eager"), args=config, **_given(_PAIR_COLUMNS))
    _set_adapter(trainer.model)
    loss = trainer._compute_loss(trainer.model, _masked(_sides(pairs)), return_outputs=False)
    return trainer.model, loss


def _concatenable(pairs: list[Pair]) -> dict[str, Tensor]:
    batch = {}
    for side, answers in (("chosen", [one[1] for one in pairs]), ("rejected", [one[2] for one in pairs])):
        rows = [(prompt, answer) for (prompt, _, _), answer in zip(pairs, answers, strict=True)]
        batch[f"{side}_input_ids"] = _padded([prompt + answer for prompt, answer in rows])
        batch[f"{side}_attention_mask"] = _padded([[1] * len(prompt + answer) for prompt, answer in rows])
        batch[f"{side}_labels"] = _padded([[-100] * len(prompt) + answer for prompt, answer in rows], -100)
    return batch


def _orpo(folder: str, method: Orpo, pairs: list[Pair]) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl.experimental.orpo")

    config = trl.ORPOConfig(**_options(folder), beta=method.beta)
    trainer = trl.ORPOTrainer(model=tiny_model("eager"), args=config, **_given(_PAIR_COLUMNS))
    _set_adapter(trainer.model)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, _concatenable(pairs))
    return trainer.model, loss


def _simpo(folder: str, method: Simpo, pairs: list[Pair]) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl.experimental.cpo")

    config = trl.CPOConfig(
        **_options(folder), loss_type="simpo", beta=method.beta, simpo_gamma=method.gamma, cpo_alpha=0.0
    )
    trainer = trl.CPOTrainer(model=tiny_model("eager"), args=config, **_given(_PAIR_COLUMNS))
    _set_adapter(trainer.model)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, _concatenable(pairs))
    return trainer.model, loss


def _kto(folder: str, method: Kto, _: list[Pair]) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl")

    config = trl.KTOConfig(
        **_options(folder),
        beta=method.beta,
        desirable_weight=method.desirable_weight,
        undesirable_weight=method.undesirable_weight,
        max_length=None,
    )
    columns: dict[str, list[Any]] = {
        "prompt": ["w5", "w6"],
        "completion": ["w7", "w8"],
        "label": [True, False],
    }
    trainer = trl.KTOTrainer(model=tiny_model("eager"), args=config, **_given(columns))
    _set_adapter(trainer.model)
    others = [ANSWERS[(place + 1) % len(ANSWERS)][1] for place in range(len(ANSWERS))]
    inputs = {
        **_masked([(prompt, answer) for prompt, answer, _ in ANSWERS]),
        **_masked([(prompt, other) for (prompt, _, _), other in zip(ANSWERS, others, strict=True)], "KL_"),
        "label": torch.tensor([is_desirable for _, _, is_desirable in ANSWERS]),
    }
    return trainer.model, trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def _reward(folder: str, method: PairwiseReward, pairs: list[Pair]) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl")

    tiny_model("eager").save_pretrained(f"{folder}/base")
    base: Any = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base", num_labels=1)
    config = trl.RewardConfig(**_options(folder), center_rewards_coefficient=method.centring, max_length=None)
    columns: dict[str, list[Any]] = {key: _PAIR_COLUMNS[key] for key in ("chosen", "rejected")}
    trainer = trl.RewardTrainer(model=base, args=config, **_given(columns, "SEQ_CLS"))
    _set_adapter(trainer.model)
    inputs = _masked(_sides(pairs))
    del inputs["completion_mask"]
    if method.margin:
        inputs["margin"] = torch.full((len(pairs),), method.margin)
    return trainer.model, trainer.compute_loss(trainer.model, inputs)


def numbers_of_grpo(name: str) -> dict[str, Any]:
    """Return what TRL's GRPO trainer makes of the rollouts of a case, with log-probabilities as they were drawn."""
    with tempfile.TemporaryDirectory() as folder:
        model, loss = _grpo(folder, LOSSES[name])
        torch.autograd.backward(loss)
    gradients = {_our_name(key): one.grad for key, one in model.named_parameters() if one.requires_grad}
    return {"loss": loss.item(), "gradients": fingerprints(gradients)}


def _grpo(folder: str, method: Grpo) -> tuple[Any, Tensor]:
    trl: Any = import_module("trl")

    config = trl.GRPOConfig(
        **_options(folder),
        beta=method.kl_weight,
        epsilon=method.clip_low,
        epsilon_high=method.clip_high,
        temperature=method.temperature,
        loss_type="dr_grpo" if method.normaliser == "CONSTANT" else "dapo",
        max_completion_length=method.max_new_tokens,
        num_generations=method.num_samples,
        per_device_train_batch_size=method.num_samples,
    )
    trainer = trl.GRPOTrainer(
        model=tiny_model("eager"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        **_given({"prompt": ["w5", "w6"]}),
    )
    _set_adapter(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    drawn = rollouts_of(method)
    answers = [list(one.token_ids) for one in drawn]
    kept = [int(not (method.drop_truncated and one.is_truncated)) for one in drawn]
    width = max(len(one.prompt) for one in drawn)
    left = [width - len(one.prompt) for one in drawn]
    prompts = [[0] * pad + list(one.prompt) for pad, one in zip(left, drawn, strict=True)]
    inputs = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in left]),
        "completion_ids": _padded(answers),
        "completion_mask": _padded([[keep] * len(one) for keep, one in zip(kept, answers, strict=True)]),
        "advantages": torch.tensor([one.advantage for one in drawn]),
        "old_per_token_logps": _padded_floats([one.logprobs for one in drawn]),
        "num_items_in_batch": torch.tensor(
            sum(keep * len(one) for keep, one in zip(kept, answers, strict=True))
        ),
    }
    if method.kl_weight:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        # Also of answers that are dropped: they are attended to by themselves alone.
        mask = torch.cat([inputs["prompt_mask"], _padded([[1] * len(one) for one in answers])], dim=1)
        with torch.no_grad(), trainer.model.disable_adapter():
            inputs["ref_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, max(map(len, answers))
            )
    return trainer.model, trainer._compute_loss(trainer.model, inputs)


def _padded_floats(rows: list[tuple[float, ...]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])


def main() -> None:
    """Write the numbers of all cases."""
    numbers = {name: numbers_of_trl(name) for name in CASES}
    numbers |= {name: numbers_of_grpo(name) for name in LOSSES}
    long_prompts = numbers_of_trl("orpo", PAIRS)["loss"]
    document = {
        "trl": importlib.metadata.version("trl"),
        "cases": numbers,
        "orpo_on_long_prompts": long_prompts,
    }
    NUMBERS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
