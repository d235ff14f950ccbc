"""TRL's SFTTrainer on the same rows in the same steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import chain
from typing import Any

from sft_step_loop import Adaptation
from sft_step_meter import Meter
from sft_step_task import MAX_GRAD_NORM, ROWS_PER_STEP, SEED, WEIGHT_DECAY, Learnt, Row, Task
from transformers import AutoTokenizer
from trl_reporter import Reporter

DEFAULT_BATCH_ROWS = 8
"""SFTConfig's own per_device_train_batch_size; two of them are a step."""
_CAPACITY_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from SFTConfig's defaults; without `bf16` nothing is cast."""

    packing: bool = False
    padding_free: bool = False
    gradient_checkpointing: bool = True
    bf16: bool = True


def run_trl(task: Task, meter: Meter, variant: Variant, adaptation: Adaptation) -> Learnt:
    """Train with SFTTrainer; returns what was learnt."""
    from trl import SFTConfig, SFTTrainer

    rows = [list(chain.from_iterable(step)) for step in task.steps()]
    packs_per_step = max(len(step) for step in task.steps())
    dataset = _packed(rows, packs_per_step) if variant.packing else _plain(rows)
    batch = 1 if variant.packing else DEFAULT_BATCH_ROWS
    options: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}} if variant.packing else {}
    if variant.padding_free:
        # SFTConfig demands it, as it would not cut rows then; none is longer than its default anyway.
        options["max_length"] = None
    model = adaptation.load(task)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=task.num_steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=packs_per_step if variant.packing else ROWS_PER_STEP // batch,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=WEIGHT_DECAY,
            train_sampling_strategy="sequential",
            packing=variant.packing,
            padding_free=variant.padding_free,
            gradient_checkpointing=variant.gradient_checkpointing,
            bf16=variant.bf16,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
            **options,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(task.model, local_files_only=True),
            callbacks=[Reporter(meter, meter.losses, "loss")],
        )
        trainer.train()
    return adaptation.learnt(model)


def places(task: Task, variant: Variant) -> int:
    """Tokens that pass through the model in all steps, padding included."""
    rows = [list(chain.from_iterable(step)) for step in task.steps()]
    if variant.packing or variant.padding_free:
        return sum(task.step_tokens())
    starts = range(0, ROWS_PER_STEP, DEFAULT_BATCH_ROWS)
    batches = [step[start : start + DEFAULT_BATCH_ROWS] for step in rows for start in starts]
    return sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches)


def _plain(steps: list[list[Row]]) -> Any:
    from datasets import Dataset

    rows = list(chain.from_iterable(steps))
    return Dataset.from_dict(
        {"input_ids": [list(row.ids) for row in rows], "labels": [row.labels for row in rows]}
    )


def _packed(steps: list[list[Row]], packs_per_step: int) -> Any:
    """TRL's own packing, step by step, so that a step has its own rows and no others.

    Each step is packed into the smallest capacity that leaves `packs_per_step` packs: the trainer takes equally
    many in every step.
    """
    from datasets import concatenate_datasets

    return concatenate_datasets([_packed_step(rows, packs_per_step) for rows in steps])


def _packed_step(rows: list[Row], num_packs: int) -> Any:
    from trl import pack_dataset

    plain = _plain([rows])
    lengths = [len(row.ids) for row in rows]
    capacity = max(*lengths, -(-sum(lengths) // num_packs))
    packed = pack_dataset(plain, capacity, "bfd")
    while len(packed) > num_packs:
        capacity += _CAPACITY_STEP
        packed = pack_dataset(plain, capacity, "bfd")
    if len(packed) != num_packs:
        raise ValueError(f"a step must make {num_packs} packs, got {len(packed)} of {capacity} tokens")
    return packed
