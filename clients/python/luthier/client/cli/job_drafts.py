"""The job that a command sends, put together from flags, a file and assignments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from luthier.client.cli.completing import names_in
from luthier.client.cli.drafts import Draft, field_option
from luthier.client.cli.notifying import notify_option
from luthier.client.cli.reinforcement import REINFORCEMENT_OPTIONS, read_grader
from luthier.client.names import short

if TYPE_CHECKING:
    from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

F = TypeVar("F", bound="Callable[..., Any]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """A rendering to mix in, as it was typed; its text is what stands for it in a message."""

    word: str
    rendering: str
    share: float

    def __str__(self) -> str:
        return json.dumps({"rendering": self.rendering, "share": self.share})


def _mixtures(context: click.Context, option: click.Parameter, words: Sequence[str]) -> tuple[Mixed, ...]:
    """Return what was typed; raise BadParameter where a word is no rendering with its share."""
    return tuple(_mixture(context, option, word) for word in words)


def _mixture(context: click.Context, option: click.Parameter, word: str) -> Mixed:
    rendering, _, share = word.rpartition("=")
    number = _finite(share)
    if not rendering or number is None:
        raise click.BadParameter(
            f"must be RENDERING=SHARE, such as general=0.2, got {word!r}", ctx=context, param=option
        )
    return Mixed(word=word, rendering=rendering, share=number)


def _finite(text: str) -> float | None:
    with suppress(ValueError):
        number = float(text)
        return number if math.isfinite(number) else None
    return None


_JOB_OPTIONS = (
    field_option(
        "--model",
        field="base_model",
        shell_complete=names_in("models"),
        help="Base model to tune.  [required, if not in a file or by --start-from]",
    ),
    field_option(
        "--rendering",
        field="rendering",
        shell_complete=names_in("renderings"),
        help="Rendering to train on.  [required, if not in a file]",
    ),
    field_option(
        "--mix",
        "mixed",
        field="mixed_renderings",
        metavar="RENDERING=SHARE",
        multiple=True,
        callback=_mixtures,
        help="Rendering to mix in, and its share of what is learnt; --rendering has the rest.  [repeatable]",
    ),
    field_option(
        "--start-from",
        field="start_from",
        shell_complete=names_in("models"),
        help="Model or JOB/CHECKPOINT to go on with, in place of --model.",
    ),
    field_option(
        "--full",
        field="full",
        is_flag=True,
        is_read=False,
        help="Train all weights, not an adapter. The result is a model of its own.",
    ),
    field_option(
        "--preference",
        field="preference.loss",
        type=click.Choice(["dpo", "ipo", "orpo", "simpo", "kto"]),
        help="Prefer the chosen answers of a PREFERENCE rendering; kto: the desirable ones of an UNPAIRED one.",
    ),
    field_option(
        "--reward-model",
        field="reward_model",
        is_flag=True,
        is_read=False,
        help="Train a model that values answers, on a PREFERENCE rendering.",
    ),
    *REINFORCEMENT_OPTIONS,
    field_option("--rank", field="lora.rank", type=int, help="Rank of the adapter. [default: 16]"),
    field_option(
        "--alpha",
        field="lora.alpha",
        type=float,
        help="Scale of the adapter is alpha / rank. [default: 2 x rank]",
    ),
    field_option(
        "--rslora",
        field="lora.use_rslora",
        is_flag=True,
        help="Scale of the adapter is alpha / the square root of rank.",
    ),
    field_option(
        "--dora",
        field="lora.use_dora",
        is_flag=True,
        help="Train lengths and directions of the adapted weights apart. Slower.",
    ),
    field_option(
        "--target",
        field="lora.target_modules",
        multiple=True,
        help="Linear module to adapt. [default: all but the head]",
    ),
    field_option(
        "--base-precision",
        field="base_precision",
        type=click.Choice(["bfloat16", "int8", "nf4"]),
        help="What the base model is held in beside an adapter; less memory, more time. [default: bfloat16]",
    ),
    field_option(
        "--epochs", field="hyperparameters.num_epochs", type=int, help="Passes over the rows. [default: 1]"
    ),
    field_option("--max-steps", field="hyperparameters.max_steps", type=int, help="Optimiser steps at most."),
    field_option(
        "--batch-tokens",
        field="hyperparameters.batch_tokens",
        type=int,
        help="Tokens in a step. [default: 4096]",
    ),
    field_option(
        "--batch-rows",
        field="hyperparameters.batch_rows",
        excludes="--batch-tokens",
        type=int,
        help="Rows in a step, in place of --batch-tokens; prompts with --reinforcement.",
    ),
    field_option(
        "--lr",
        "--learning-rate",
        "learning_rate",
        field="hyperparameters.learning_rate",
        type=float,
        help="Peak learning rate. [default: by method, 2e-4 for an adapter, a tenth with --full]",
    ),
    field_option(
        "--warmup-steps",
        field="hyperparameters.warmup_steps",
        type=int,
        help="Steps to rise to it. [default: 0]",
    ),
    field_option(
        "--schedule",
        field="hyperparameters.learning_rate_schedule",
        type=click.Choice(["constant", "linear", "cosine", "warmup-stable-decay"]),
        help="After it. [default: cosine]",
    ),
    field_option(
        "--activation-checkpointing",
        field="hyperparameters.activation_checkpointing",
        type=click.Choice(["none", "selective", "full"]),
        help="How much a pass keeps for its gradient; less memory, more time. [default: what fits]",
    ),
    field_option(
        "--optimiser-states",
        field="hyperparameters.optimiser_states",
        type=click.Choice(["float32", "int8", "offloaded"]),
        help="What the optimiser's moments are held in between updates; offloaded: in main memory beside a GPU. "
        "[default: float32]",
    ),
    field_option("--seed", field="hyperparameters.seed", type=int, help="Seed of the run. [default: 0]"),
    field_option(
        "--checkpoint-interval",
        field="checkpoint_interval_steps",
        type=int,
        help="Steps between checkpoints. [default: 25]",
    ),
    field_option(
        "--max-checkpoints",
        field="max_checkpoints",
        type=int,
        help="Checkpoints kept besides the best. [default: 3]",
    ),
    field_option(
        "--validation-interval",
        field="validation_interval_steps",
        type=int,
        help="Steps between validations. [default: an epoch]",
    ),
    field_option(
        "--sharding",
        field="sharding",
        type=click.Choice(["replicated", "fsdp2"]),
        help="What each rank holds of the model; fsdp2: a part, on at least 2 ranks. [default: all]",
    ),
    field_option(
        "--require-device",
        field="requirements.device",
        type=click.Choice(["cpu", "cuda", "rocm", "gpu"]),
        help="What its worker must compute on; gpu: cuda or rocm. [default: any]",
    ),
    notify_option,
)


def job_options(function: F) -> F:
    """Give a command the flags of a job."""
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return function


def job_kind() -> type[FineTuningJob]:
    """Return the message of a job."""
    from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

    return FineTuningJob


def drafted_job(
    draft: Draft[FineTuningJob],
    reinforcement: str | None,
    *,
    full: bool,
    reward_model: bool,
) -> FineTuningJob:
    """Return the job that is wanted, all its weights trained with `full`.

    The one in the file may be a job that exists: its tuned model's name was then made of its own and is not a wish.
    """
    job = draft.message
    if job.tuned_model_id and job.tuned_model_id == short(job.name):
        job.tuned_model_id = ""
    given = click.get_current_context().params
    if given["mixed"]:
        # What the file says of the job's own share is of another mixture.
        job.rendering_share = 0
    if full:
        if job.HasField("lora"):
            raise click.UsageError(
                "--full trains all weights: give no --rank, --alpha, --target, and no lora"
            )
        job.full.SetInParent()
    is_preference = job.HasField("preference") or given["preference"] is not None
    is_reinforcement = job.HasField("reinforcement") or reinforcement is not None
    if is_preference + reward_model + is_reinforcement > 1:
        raise click.UsageError(
            "give one of --preference, --reward-model and --reinforcement; --num-samples and --max-new-tokens are of "
            "the last"
        )
    if reward_model:
        job.reward_model.SetInParent()
    if reinforcement is not None:
        job.reinforcement.grader.CopyFrom(read_grader(reinforcement))
    wanted = draft.finish()
    if not (wanted.base_model or wanted.start_from):
        raise click.UsageError(
            "Missing option '--model' or '--start-from', or one of them in a file or by --set."
        )
    return wanted
